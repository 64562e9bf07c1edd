"""Send a run to a server, wait for it under a job id, fetch what it saved, and count the bytes on the way."""

import ast
import io
import pickle
import random
import sys
import time
from contextlib import redirect_stdout, suppress
from typing import Any

import httpx
import torch
import zstandard
from nnsight import CONFIG
from nnsight import __version__ as nnsight_version
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.schema.request import RequestModel
from nnsight.schema.response import ResponseModel, Status
from nnsight.tracing.util import SerializedFrame
from torch import Tensor

from sinkscope.errors import InputError, RemoteError
from sinkscope.models.requests import mark_of
from sinkscope.models.wire import ServerError, Traffic, Wire

CONNECT = 10.0  # seconds until a server must have taken the connection
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before a call is made again; doubled every time
FIRST_LOOK, LONGEST_LOOK = 0.05, 2.0  # seconds between two questions for a job's status
NOT_REACHED = (httpx.ConnectError, httpx.ConnectTimeout)
NO_ROOM = (429, 503)  # refused before anything was done
JITTER = random.Random()  # of its own: a user's seed stays where it is
# What pydantic, zstandard and torch.load raise on bytes that are not what nnsight writes.
GARBAGE = (ValueError, TypeError, LookupError, AttributeError, ImportError, EOFError, RuntimeError)
GARBAGE += (OSError, zstandard.ZstdError, pickle.UnpicklingError)


class Unanswered(Exception):  # noqa: N818  an answer that is missing is no error yet
    """A call brought no answer: what came, whether to call again, and after how many seconds, as text."""


class DryRun(LocalSimulationBackend):
    """nnsight's ``"local"``: the way of a remote run without a server; what it would send is measured."""

    plain_at: Tensor | None = None
    plain: Any = None

    def __init__(self) -> None:
        super().__init__(None)
        self.job_id, self.mark, self.traffic = None, "", Traffic(0, 0)

    def of(self, traced: Any) -> "DryRun":
        """The same for nnsight's model."""
        self.model = traced
        return self

    def __call__(self, tracer: Any) -> None:
        """Run a trace as on a server."""
        up = len(RequestModel.serialize(tracer, CONFIG.API.COMPRESS))
        frame = tracer.info.frame
        before = dict(frame.f_locals)
        super().__call__(tracer)
        file = io.BytesIO()
        torch.save({k: v for k, v in frame.f_locals.items() if before.get(k) is not v}, file)
        down = file.getvalue()
        down = zstandard.ZstdCompressor().compress(down) if CONFIG.API.COMPRESS else down
        self.traffic = Traffic(up, len(down))


class Job(RemoteBackend):
    """One request to a server: nnsight sends it at the end of a trace, and `wait` brings what it saved.

    It is sent once. Made again are only calls that change nothing there: one that did not reach the server,
    one that it had no room for, the question for a status, and a download.

    Args:
        where: True for the server of ``nnsight.CONFIG.API``, or its address.
        job_id: A job that was sent before, and is not sent again.

    Attributes:
        plain_at: Positions ``[batch]`` whose logits to bring from one more pass, without edits, or None.
        plain: Those logits.
    """

    plain_at: Tensor | None = None
    plain: Any = None

    def __init__(self, where: bool | str, wire: Wire, job_id: str | None = None) -> None:
        address = where.rstrip("/") if isinstance(where, str) else None
        super().__init__("", address, blocking=False, job_id=job_id)
        self.wire, self.mark, self.last, self.result = wire, "", "none yet", ""
        self.key = {"ndif-api-key": self.api_key} if self.api_key else {}
        self.up, self.down, self.known = 0, 0, True
        self.sent, self.ran, self.done = time.monotonic(), 0.0, 0.0

    def of(self, traced: Any) -> "Job":
        """The same for nnsight's model."""
        self.model_key, self.env = traced.to_model_key(), traced._remoteable_get_env()
        return self

    @property
    def traffic(self) -> Traffic:
        """What a job that is done has cost."""
        waited = (self.ran - self.sent, self.done - self.ran)
        return Traffic(self.up, self.down, *waited, self.job_id)

    def submit(self, tracer: Any) -> None:
        """Send the request of a trace, and note its job id."""
        blob = self._serialize(tracer)
        request = RequestModel(model_key=self.model_key, compress=self.compress, env=self.env)
        headers = {"ndif-timestamp": repr(time.time()), "python-version": sys.version}
        headers["nnsight-version"] = nnsight_version
        form = {"blob": ("request", blob, "application/octet-stream")}
        told = {"data": {"data": request.metadata()}, "headers": headers | self.key}
        self.sent = time.monotonic()
        # A connection that is used again may be closed just then, and no one knows if the request ran.
        with httpx.Client(limits=httpx.Limits(max_keepalive_connections=0)) as client:
            url = f"{self.host}/request"
            response = self._ask(client, "POST", url, read_status, files=form, **told)
        self.job_id, self.sent = response.id, time.monotonic()
        self._note(response)

    def _serialize(self, tracer: Any) -> bytes:
        """The payload, under a file name of the block's own.

        A server reads the source of one name once, for all requests: blocks of two versions of one file, or
        two blocks inside which others are, would be taken for each other.
        """
        frame, node = tracer.info.frame, tracer.node
        own = f"{frame.f_code.co_filename} [{mark_of(node.lineno, ast.unparse(node))}]"
        named = SerializedFrame(own, frame.f_code.co_firstlineno, frame.f_code.co_name)
        named.f_locals, named.f_globals = dict(frame.f_locals), frame.f_globals
        tracer.info.frame = named
        try:
            return super()._serialize(tracer)
        finally:
            tracer.info.frame = frame

    def wait(self, *names: str) -> list[Any]:
        """The saved values of these names, of which the first is a list that begins with the `mark`.

        RemoteError with the ``job_id``, where the job may go on, if they cannot be had; a KeyboardInterrupt
        has it too. InputError if the job is that of another call.
        """
        look, url = FIRST_LOOK, f"{self.host}/response/{self.job_id}"
        try:
            with httpx.Client() as client:
                while not self._note(self._ask(client, "GET", url, read_status, headers=self.key)):
                    self._pause(look)
                    look = min(look * 1.5, LONGEST_LOOK)
                # The store of results, which may be elsewhere, does not get the key.
                found = self._ask(client, "GET", self.result, self._read_result)
        except KeyboardInterrupt as stop:
            stop.args = (f"Got an interrupt while waiting. {self._hint}",)
            vars(stop)["job_id"] = self.job_id
            raise
        first = found.get(names[0])
        if not isinstance(first, list) or first[:1] != [self.mark]:
            got = f"Got job={self.job_id!r}, which answers another call; expected that of this one"
            write = "Write the call as it was: the same sample, probes, interventions and options."
            raise InputError(f"{got}. {write}")
        return [found.get(name) for name in names]

    def _read_result(self, content: bytes) -> dict[str, Any]:
        """What was saved; ValueError or TypeError if it is no dict."""
        return dict(self.finalize(content))

    def _note(self, response: ResponseModel) -> bool:
        """Whether a status says that the job is done; RemoteError if it says that it failed."""
        if response.status != self.status or sys.stdout.isatty():  # a log gets a line per change
            with redirect_stdout(sys.stderr):  # what a command prints may be read by another
                self.display.update(response)
        self.status, said = response.status, response.description.strip()
        self.last = f"{response.status.value} {said}".strip()
        now = time.monotonic()
        if response.status in (Status.RUNNING, Status.COMPLETED, Status.ERROR):
            self.ran = self.ran or now
        self.done = now
        if response.status != Status.ERROR:
            self.result = str(response.data)
            return response.status == Status.COMPLETED
        self.job_id = None  # there is nothing to come back to
        if "Traceback (most recent call last)" in said:
            got = f"The run failed on {self.host}: {said.splitlines()[-1]}"
            raise ServerError(f"{got}\n{said}", said)
        name = self.model_key.partition(":")[2] or "the model of this job"
        got = f"{self.host} did not run {name} ({said})"
        write = "print(nnsight.status()) for what it hosts"
        raise RemoteError(f"{got}; expected a model that it hosts. Write {write}.")

    def _ask(self, client: httpx.Client, method: str, url: str, read: Any, **form: Any) -> Any:
        """What ``read`` makes of the answer to a call, which is made again where that changes nothing."""
        turn = 0
        while True:
            try:
                return self._call(client, method, url, read, form)
            except Unanswered as missed:
                said, again, after = missed.args
                if not again or turn == self.wire.retries:
                    raise self._error(said) from missed.__cause__
                pause = min(FIRST_PAUSE * 2**turn, LONGEST_PAUSE) * JITTER.uniform(0.5, 1)
                self._pause(max(pause, float(after) if after.isdigit() else 0.0), said)
                turn += 1

    def _call(self, client: httpx.Client, method: str, url: str, read: Any, form: Any) -> Any:
        """The same for one call; Unanswered with what came, whether to call again, and when."""
        patience = max(min(self.wire.patience, self._left), 0.001)
        limits = httpx.Timeout(patience, connect=min(CONNECT, patience))
        harmless, after = method == "GET", ""
        try:
            answer = client.request(method, url, timeout=limits, **form)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            again = harmless or isinstance(error, NOT_REACHED)
            raise Unanswered(self._lost(error, method), again, after) from error
        self.up += int(answer.request.headers.get("content-length", 0))
        self.down += answer.num_bytes_downloaded
        if not answer.is_success:
            again = answer.status_code in NO_ROOM or (harmless and answer.status_code >= 404)
            after = answer.headers.get("retry-after", "")
            raise Unanswered(self._refused(answer), again, after)
        try:
            return read(answer.content)
        except GARBAGE as error:
            kind = answer.headers.get("content-type", "unknown type")
            got = f"Got {answer.content[:60]!r} ({kind}) from {url.partition('?')[0]}"
            wanted = "what nnsight writes. Is an NDIF server of this nnsight at the address?"
            raise Unanswered(f"{got}; expected {wanted}", harmless, after) from error

    def _refused(self, answer: httpx.Response) -> str:
        """What an HTTP status other than success means, and what to write."""
        detail, code, host = answer.text.strip()[:300], answer.status_code, self.host
        with suppress(ValueError, KeyError, TypeError):
            detail = str(answer.json()["detail"])
        said, asked = f"{code}: {detail}".rstrip(": "), str(answer.url).partition("?")[0]
        ours = asked.startswith((f"{host}/request", f"{host}/response/"))  # else a store of results
        if code in (401, 403) and ours:
            got = "an API key that" if self.api_key else "no API key, which"
            write = "Write nnsight.CONFIG.set_default_api_key('...'), or set NDIF_API_KEY."
            return f"Got {got} {host} refuses ({said}); expected one that it gave. {write}"
        if code in NO_ROOM:
            return f"{host} takes no call now ({said}); expected room in its queue. Come again."
        if code == 400 and "version" in detail:
            got = f"Got nnsight {nnsight_version} and Python {sys.version.split()[0]} here, which"
            write = "Install them: print(nnsight.compare()) lists both sides."
            return f"{got} {host} refuses ({said}); expected versions that fit its own. {write}"
        if code == 404 and ours and self.job_id:
            self.known = False
            return f"{host} knows no job {self.job_id!r} ({said}); expected one that it keeps."
        return f"{asked} answers with {said}; expected success."

    def _lost(self, error: Exception, method: str) -> str:
        """What a call that was not answered means, and what to write."""
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        if isinstance(error, NOT_REACHED):
            look = "Look at the network, remote=... and nnsight.CONFIG.API.HOST."
            return f"Got no connection to {self.host} ({said}); expected a server there. {look}"
        got = f"{self.host} gave no whole answer ({said}); expected one within {self.wire.patience:g} s"
        if method == "GET":
            return f"{got}."
        return f"{got}. The request may run there, so it was not sent again. Repeat the call if it may run twice."

    @property
    def _left(self) -> float:
        """Seconds until the time-out."""
        return self.sent + self.wire.timeout - time.monotonic()

    @property
    def _hint(self) -> str:
        """How to come back to a job that goes on."""
        write = f"the same call with job={self.job_id!r} fetches its result"
        write += " (of lvlm.run, lvlm.generate or trace_sinks)."
        return f"The job stays there: {write}" if self.job_id and self.known else ""

    def _pause(self, seconds: float, why: str = "") -> None:
        """Wait; RemoteError at the time-out."""
        if (left := self._left) <= 0:
            got = f"Got no result within timeout={self.wire.timeout:g} s (last status: {self.last})"
            raise self._error(f"{got}; expected one. {why}".strip())
        time.sleep(min(seconds, left))

    def _error(self, said: str) -> RemoteError:
        """An error with the job to come back to."""
        return RemoteError(f"{said} {self._hint}".strip(), self.job_id if self.known else None)


def read_status(content: bytes) -> ResponseModel:
    """A status as nnsight writes it; ValueError if it is none, or done without an address of its result."""
    response = ResponseModel.model_validate_json(content)
    if response.status == Status.COMPLETED and not isinstance(response.data, str):
        raise ValueError(f"got data={response.data!r}; expected an address")
    return response


Call = Job | DryRun
"""What carries a run to where the model is."""


def call_to(
    where: bool | str, wire: Any, job: str | None = None, plain_at: Tensor | None = None
) -> Call | None:
    """What carries a run there, None for a run here; InputError for a job without a server. See `Job`."""
    if not isinstance(wire, Wire):
        got = f"Got lvlm.wire={wire!r}; expected a Wire"
        raise InputError(f"{got}. Write lvlm.wire = ss.models.Wire(timeout=600).")
    if where is False or where == "local":
        if job is not None:
            got = f"Got job={job!r} with remote={where!r}; expected the server that has the job"
            raise InputError(f"{got}. Write remote=True, or its address.")
        made = DryRun() if where else None
    else:
        made = Job(where, wire, job)
    if made is not None:
        made.plain_at = plain_at
    return made
