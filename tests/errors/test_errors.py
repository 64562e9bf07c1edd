"""One base class catches everything, a builtin catches each sensibly, and typos are understood."""

import inspect

import pytest

import sinkscope as ss
from sinkscope import errors
from sinkscope.errors import SinkscopeError, nearest

CLASSES = [
    one
    for _, one in inspect.getmembers(errors, inspect.isclass)
    if one.__module__ == errors.__name__ and one is not SinkscopeError
]


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_error_is_ours_and_a_builtin(error):
    assert issubclass(error, SinkscopeError)
    builtin = [base for base in error.__mro__ if base.__module__ == "builtins"]
    assert builtin[0] not in (Exception, BaseException, object)
    assert inspect.getdoc(error)
    assert error.__name__.endswith("Error")


def test_code_that_knows_nothing_of_us_catches_them():
    with pytest.raises(OSError, match="no folder"):
        ss.LVLM.from_pretrained("./not/there")
    with pytest.raises(TypeError, match="expected a transformers model"):
        ss.LVLM(None)
    with pytest.raises(ValueError, match="expected one of"):
        ss.Site("language", "resid")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("imgae", "Did you mean 'image'?"),
        ("image:2", "Did you mean 'image:1'?"),
        ("zzz", "Known: 'bos', 'image', 'image:1'."),
    ],
)
def test_the_nearest_name_is_suggested_or_all_are_listed(typed, says):
    assert nearest(typed, ["image", "image:1", "bos"]) == says
