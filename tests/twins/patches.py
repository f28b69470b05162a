"""Patches by hooks on whole models: one forward of the source, which is listened to, and one of the host, which is told
what the source gave. It shares no code with the package."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch

from twins import reference

# What blocks call their attention, its output projection, and their MLP.
PARTS = {"gpt2": ("attn", "c_proj", "mlp"), **dict.fromkeys(("gpt_neox", "phi"), ("self_attn", "dense", "mlp"))}
OTHERS = ("self_attn", "o_proj", "mlp")


def part(model, site, block):
    """The module whose output (or, of heads, whose input) is patched."""
    attention, projection, mlp = PARTS.get(model.config.model_type, OTHERS)
    path = {"attention": attention, "head": f"{attention}.{projection}", "mlp": mlp}[site]
    return reference.parts(model).blocks[block].get_submodule(path)


@contextmanager
def changing(module, change, *, input):
    """Within this context ``change`` is called with what the module reads, or gives, [T, W], and may change it."""

    def hook(_, given, *output):
        given = output[0] if output else given
        own = given[0] if isinstance(given, tuple) else given
        changed = own.clone()
        change(changed[0])
        return (changed, *given[1:]) if isinstance(given, tuple) else changed

    handle = module.register_forward_pre_hook(hook) if input else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def entering(model, block, position, row):
    """Within this context the state that enters a block is another one at this position."""

    def hook(_, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[0, position] = row
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handle = reference.parts(model).blocks[block].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def swapped(host, source, first, last):
    """Within this context these blocks of the host are the source's."""
    blocks, others = (reference.parts(model).blocks for model in (host, source))
    own = [blocks[index] for index in range(first, last + 1)]
    for index in range(first, last + 1):
        blocks[index] = others[index]
    try:
        yield
    finally:
        for index, block in enumerate(own, first):
            blocks[index] = block


def given(source, ids, site, block):
    """What the source gives: the state that enters the block, [T, D], or of a part what is patched at p, [W]."""
    if site == "state":
        return reference.states(source, ids, block)
    seen = []
    with changing(part(source, site, block), lambda rows: seen.append(rows[-1].clone()), input=site == "head"):
        reference.forward(source, ids)
    (row,) = seen
    return row


def patched(host, source, ids, site, block, *, head=None, n_heads=4, end=None, offset=0, given=given):
    """The host's final state at p, [D], with one patch, of what ``given`` says that the source gives."""
    position = len(ids) - 1 + offset
    with ExitStack() as hooks:
        if site == "state":
            hooks.enter_context(entering(host, block, position, given(source, ids, site, block)[position]))
        elif site == "block":
            hooks.enter_context(swapped(host, source, block, end))
        else:
            row = given(source, ids, site, block)
            width = len(row) // n_heads
            columns = slice(head * width, (head + 1) * width) if site == "head" else slice(None)

            def put(rows):
                rows[-1, columns] = row[columns]

            hooks.enter_context(changing(part(host, site, block), put, input=site == "head"))
        return reference.final_hidden(host, ids)[-1]


def margin(model, final, y_pt, y_it):
    """logit(y_it) - logit(y_pt) of a final state."""
    with torch.no_grad():
        return reference.exact_margin(model, final, y_pt, y_it)
