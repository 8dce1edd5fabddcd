"""What we rely on in pluggy, in every version that we allow; the session `pluggy` runs this with each."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pluggy
import pytest

from tensorway import hookspecs
from tensorway.errors import OfferInvalid
from tensorway.plugins.slots import check_hook
from tensorway.types import HookContext


def manager() -> pluggy.PluginManager:
    made = pluggy.PluginManager(hookspecs.PROJECT)
    made.add_hookspecs(hookspecs)
    return made


def test_a_stub_with_a_function_in_its_dict_is_a_plugin_and_is_not_called_at_registration():
    called = []
    stub = SimpleNamespace(transport=hookspecs.hookimpl(lambda ctx: called.append(ctx)))
    made = manager()
    made.register(stub, name="transport:x@y")
    assert [] == called
    made.hook.transport(ctx="the context")
    assert ["the context"] == called


def test_every_hook_has_a_specification_that_pluggy_knows():
    made = manager()
    assert set(hookspecs.HOOKS) == {name for name in hookspecs.HOOKS if getattr(made.hook, name).spec is not None}


@pytest.mark.parametrize("kind", hookspecs.HOOKS)
def test_a_plugin_may_leave_out_the_argument_and_may_not_add_one(kind):
    def without():
        return None

    def other(ctx, more):
        return None

    assert without is check_hook(without, kind)
    with pytest.raises(OfferInvalid, match="more") as caught:
        check_hook(other, kind)
    assert f"{kind}(ctx, more)" in caught.value.true
    assert f"{kind}{inspect.signature(hookspecs.HOOKS[kind])}" in caught.value.true


def test_checking_a_hook_leaves_the_plugins_function_as_it_was():
    def transport(ctx: HookContext) -> None:
        return None

    check_hook(transport, "transport")
    assert {} == vars(transport)


def test_a_callable_object_and_a_partial_are_hooks_too():
    import functools

    class Hook:
        def __call__(self, ctx):
            return None

    for hook in (Hook(), functools.partial(lambda flavor, ctx: None, "x")):
        assert hook is check_hook(hook, "transport")


def test_no_hook_of_the_contract_has_a_default_argument():
    # pluggy up to 1.6 passes the default, 1.7 the caller's value: the same plugin would mean two things.
    for spec in hookspecs.HOOKS.values():
        assert all(p.default is inspect.Parameter.empty for p in inspect.signature(spec).parameters.values())
