"""Descriptions of sweeps, TOML or Python: what each means, and what is refused."""

from __future__ import annotations

import pytest
import torch
from sweeps import TENSORS, WIDTH, digests, one_edit

from actcache.errors import InputError
from actcache.replay.edits import (
    Add,
    Edit,
    Interpolate,
    MatchedNorm,
    Project,
    Replace,
    SignedPermutation,
    Variant,
)
from actcache.replay.sweep import Sweep, read_sweep


def test_every_kind_of_edit_is_what_it_says(written):
    text = """
    [[variants]]
    name = "replaced"
    edits = [{ edit = "replace", donor = "it" }]
    [[variants]]
    name = "knocked out"
    edits = [{ edit = "replace", vector = "zeros", site = "mlp", layers = [3, 4] }]
    [[variants]]
    name = "set"
    edits = [{ edit = "replace", vector = { file = "x.safetensors", tensor = "d" }, positions = "all" }]
    [[variants]]
    name = "pushed"
    edits = [{ edit = "add", vector = { file = "x.safetensors", tensor = "d" }, scale = -2, positions = [0, -1] }]
    [[variants]]
    name = "towards"
    edits = [{ edit = "interpolate", donor = "it", weight = 0.5, positions = "last" }]
    [[variants]]
    name = "kept"
    [[variants.edits]]
    edit = "project"
    basis = { file = "x.safetensors", tensor = "basis2" }
    mean = { file = "x.safetensors", tensor = "d" }
    [[variants]]
    name = "swapped"
    edits = [{ edit = "project", basis = { file = "x.safetensors", tensor = "basis2" }, how = "swap", donor = "it" }]
    [[variants]]
    name = "permuted"
    edits = [{ edit = "signed_permutation", seed = 3, donor = "it", per = "prompt", positions = "all" }]
    [[variants]]
    name = "controls"
    [[variants.edits]]
    edit = "signed_permutation"
    seed = 3
    donor = "pt"
    [[variants.edits]]
    edit = "matched_norm"
    seed = 4
    site = "attention"
    layers = [2]
    """
    sweep = read_sweep(written(text), WIDTH)
    d, basis = TENSORS["d"], TENSORS["basis2"]
    expected = [
        Variant("replaced", [Edit(Replace("it"))]),
        Variant("knocked out", [Edit(Replace(vector=torch.zeros(WIDTH)), site="mlp", layers=(3, 4))]),
        Variant("set", [Edit(Replace(vector=d), "all")]),
        Variant("pushed", [Edit(Add(d, -2.0), (0, -1))]),
        Variant("towards", [Edit(Interpolate("it", 0.5))]),
        Variant("kept", [Edit(Project(basis, "keep", d))]),
        Variant("swapped", [Edit(Project(basis, "swap", donor="it"))]),
        Variant("permuted", [Edit(SignedPermutation(3, "it", "prompt"), "all")]),
        Variant("controls", [Edit(SignedPermutation(3, "pt")), Edit(MatchedNorm(4), site="attention", layers=(2,))]),
    ]
    for boundary in (1, 2):
        assert digests(sweep.variants_at(boundary)) == digests(expected)
        assert [variant.name for variant in sweep.variants_at(boundary)] == [variant.name for variant in expected]
    assert (sweep.boundaries, sweep.scopes, sweep.readouts) == (None, None, None)
    assert (sweep.top1, sweep.kl) == (False, False)


def test_sweep_tables_expand_to_their_product(written):
    text = """
    [[variants]]
    name = "v"
    [[variants.edits]]
    edit = "interpolate"
    donor = "it"
    sweep = { weight = [0.25, 1], positions = ["last", "all"] }
    [[variants.edits]]
    edit = "matched_norm"
    sweep = { seed = [7, 8] }
    """
    variants = read_sweep(written(text), WIDTH).variants_at(2)
    expected = [
        Variant(
            f"v[weight={weight},positions={positions},seed={seed}]",
            [Edit(Interpolate("it", weight), positions), Edit(MatchedNorm(seed))],
        )
        for weight in (0.25, 1)
        for positions in ("last", "all")
        for seed in (7, 8)
    ]
    assert digests(variants) == digests(expected)
    assert [variant.name for variant in variants] == [variant.name for variant in expected]


def test_tensors_and_variants_of_a_boundary(written):
    text = """
    boundaries = [2, 3]
    scopes = ["prefix", "position", "prefix"]
    readouts = ["native", "common_it"]
    top1 = true
    [[variants]]
    name = "pushed"
    edits = [{ edit = "add", vector = { file = "x.safetensors", tensor = "d{boundary}" } }]
    [[variants]]
    name = "kept"
    edits = [{ edit = "project", basis = { file = "x.safetensors", tensor = "basis{boundary}" } }]
    [[variants]]
    name = "only at 3"
    boundaries = [3]
    edits = [{ edit = "replace", donor = "it" }]
    """
    sweep = read_sweep(written(text), WIDTH)
    assert (sweep.boundaries, sweep.scopes, sweep.readouts) == ("2,3", ("prefix", "position"), ("native", "common_it"))
    assert sweep.top1
    for boundary in (2, 3):
        expected = [
            Variant("pushed", [Edit(Add(TENSORS[f"d{boundary}"]))]),
            Variant("kept", [Edit(Project(TENSORS[f"basis{boundary}"]))]),
        ]
        if boundary == 3:
            expected.append(Variant("only at 3", [Edit(Replace("it"))]))
        assert digests(sweep.variants_at(boundary)) == digests(expected)
    with pytest.raises(InputError, match=r"variant 'pushed': vector: .* has no tensor 'd4'; it has basis2"):
        sweep.variants_at(4)


@pytest.mark.parametrize(
    ("given", "asked"), [('"all"', "all"), ("2", "2"), ("0.6", "0.6"), ('"1,2"', "1,2"), ("[1, 2]", "1,2")]
)
def test_boundaries_in_words_and_numbers(written, given, asked):
    assert read_sweep(written(f"boundaries = {given}"), WIDTH).boundaries == asked


def test_the_python_form(written):
    text = """
from actcache.replay.edits import Call, Edit, Variant
from actcache.replay.sweep import Sweep

def doubled(rows, at):
    return rows * 2

def variants(boundary):
    return [Variant(f"doubled at {boundary}", [Edit(Call(doubled, f"double {boundary}"))])]

sweep = Sweep(boundaries="all", scopes=("position",), variants=variants)
"""
    sweep = read_sweep(written(text, "s.py"), WIDTH)
    assert [variant.name for variant in sweep.variants_at(3)] == ["doubled at 3"]
    assert (sweep.boundaries, sweep.scopes) == ("all", ("position",))
    with pytest.raises(
        InputError, match=r"other\.py assigns NoneType to 'sweep', expected an actcache\.replay\.sweep\.Sweep"
    ):
        read_sweep(written("x = 1", "other.py"), WIDTH)
    assert Sweep(variants=[Variant("a")]).variants_at(1) == (Variant("a"),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\nsweep = (", "line 2: SyntaxError: '(' was never closed"),
        ("x = 1\n\nx / 0", "line 3: ZeroDivisionError: division by zero"),
        ("import os\nimport not_there", "line 2: ModuleNotFoundError: No module named 'not_there'"),
        ("def f():\n    raise ValueError('a\\nb')\nf()", "line 2: ValueError: a b"),
        ("import json\njson.loads('{')", "line 2: JSONDecodeError: "),
        ("from actcache.replay.edits import Replace\nReplace()", "line 2: replace takes either"),
    ],
)
def test_code_of_the_python_form_that_fails_is_one_line(written, text, words):
    path = written(text, "s.py")
    with pytest.raises(InputError) as caught:
        read_sweep(path, WIDTH)
    assert str(caught.value).startswith(f"{path}, {words}")
    assert "\n" not in str(caught.value)


FILE = 'file = "x.safetensors"'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("variants = ", "is not TOML"),
        (
            "boundary = 3",
            "the sweep has a key 'boundary'; it may have boundaries, kl, readouts, scopes, top1, variants",
        ),
        ("top1 = 1", "top1 is 1, expected true or false"),
        ("kl = 'yes'", "kl is 'yes', expected true or false"),
        ("boundaries = true", "boundaries is True, expected"),
        ("boundaries = [2, 0.5]", r"boundaries is \[2, 0.5\], expected a list of whole numbers"),
        ("boundaries = { a = 1 }", "boundaries is .*, expected"),
        ('scopes = "prefix"', "scopes is 'prefix', expected a list of texts"),
        ('scopes = ["prefix", "suffix"]', "scope 'suffix' is unknown; choose prefix or position"),
        ("scopes = []", r"scopes is \[\], expected"),
        ("readouts = [1]", r"readouts is \[1\], expected a list of texts"),
        ("readouts = []", r"readouts is \[\], expected"),
        ("variants = 3", "variants is 3, expected a list of tables"),
        ("[[variants]]\nname = 3", "a variant's name is 3, expected a text"),
        ("[[variants]]\nedits = []", "a variant's name is None"),
        ('[[variants]]\nname = ""', "a variant's name is ''"),
        ('[[variants]]\nname = "v"', "variant 'v' has no edits"),
        ('[[variants]]\nname = "v"\nedit = 1', "a variant has a key 'edit'; it may have boundaries, edits, name"),
        ('[[variants]]\nname = "v"\nedits = 1', "variant 'v': edits is 1, expected a list of tables"),
        (
            '[[variants]]\nname = "v"\nboundaries = 3\nedits = [{}]',
            "'v': boundaries is 3, expected a list of whole numbers",
        ),
        (one_edit(""), "variant 'v': edit None is unknown; choose replace, add"),
        (one_edit('edit = "subtract"'), "variant 'v': edit 'subtract' is unknown; choose replace, add"),
        (one_edit("edit = [1]"), r"variant 'v': edit \[1\] is unknown"),
        (one_edit('edit = "replace"\nweight = 1'), "variant 'v': edit 'replace' has a key 'weight'; it may have donor"),
        (one_edit('edit = "replace"'), "variant 'v': replace takes either a donor or a vector"),
        (one_edit('edit = "replace"\ndonor = 3'), "variant 'v': edit 'replace': donor is 3"),
        (one_edit('edit = "add"'), "variant 'v': edit 'add' needs 'vector'"),
        (
            one_edit('edit = "add"\nvector = "ones"'),
            r"vector is 'ones', expected \{ file = ..., tensor = ... \} or zeros",
        ),
        (one_edit('edit = "add"\nvector = { file = "x" }'), "vector is {'file': 'x'}, expected"),
        (one_edit('edit = "add"\nvector = { file = 3, tensor = "d" }'), "vector is .*'file': 3.*, expected"),
        (one_edit(f'edit = "add"\nvector = {{ {FILE}, tensor = 3 }}'), "vector is .*'tensor': 3.*, expected"),
        (one_edit('edit = "add"\nvector = { file = "no", tensor = "d" }'), "vector: .*no is not a safetensors file"),
        (one_edit(f'edit = "add"\nvector = {{ {FILE}, tensor = "e" }}'), "vector: .* has no tensor 'e'; it has basis2"),
        (
            one_edit(f'edit = "add"\nvector = {{ {FILE}, tensor = "narrow" }}'),
            r"vector: .* shape \[5\], expected \[32\]",
        ),
        (one_edit(f'edit = "add"\nvector = {{ {FILE}, tensor = "basis2" }}'), r"vector: .*, expected \[32\]"),
        (one_edit('edit = "add"\nvector = "zeros"\nscale = "2"'), "edit 'add': scale is '2'"),
        (one_edit('edit = "add"\nvector = "zeros"\nscale = true'), "edit 'add': scale is True"),
        (one_edit('edit = "interpolate"\ndonor = "it"'), "edit 'interpolate' needs 'weight'"),
        (one_edit('edit = "interpolate"\nweight = 1'), "edit 'interpolate' needs 'donor'"),
        (one_edit('edit = "interpolate"\ndonor = "it"\nweight = "1"'), "edit 'interpolate': weight is '1'"),
        (one_edit('edit = "interpolate"\ndonor = "it"\nweight = nan'), "edit 'interpolate': weight is nan"),
        (one_edit('edit = "project"'), "edit 'project' needs 'basis'"),
        (one_edit('edit = "project"\nbasis = "zeros"'), r"basis is 'zeros', expected \{ file = ..., tensor = ... \}$"),
        (one_edit(f'edit = "project"\nbasis = {{ {FILE}, tensor = "d" }}'), r"basis: .*, expected \[k, 32\]"),
        (
            one_edit(f'edit = "project"\nbasis = {{ {FILE}, tensor = "not orthonormal" }}'),
            "v': project: .* orthonormal",
        ),
        (one_edit(f'edit = "project"\nbasis = {{ {FILE}, tensor = "basis2" }}\nhow = "drop"'), "how is 'drop'; choose"),
        (one_edit(f'edit = "project"\nbasis = {{ {FILE}, tensor = "basis2" }}\nhow = "swap"'), "a donor goes with"),
        (one_edit('edit = "signed_permutation"'), "edit 'signed_permutation' needs 'seed'"),
        (one_edit('edit = "signed_permutation"\nseed = 1\nper = "event"'), "'v': signed_permutation: per is 'event'"),
        (one_edit('edit = "signed_permutation"\nseed = 1\nper = 1'), "edit 'signed_permutation': per is 1, expected a"),
        (one_edit('edit = "matched_norm"\nseed = 1\nper = "prompt"'), "edit 'matched_norm' has a key 'per'"),
        (one_edit('edit = "matched_norm"\nseed = 0.5'), "edit 'matched_norm': seed is 0.5"),
        (one_edit('edit = "signed_permutation"\nseed = 123456789123456789123'), "seed is 123456789123456789123"),
        (one_edit('edit = "replace"\ndonor = "it"\npositions = 3'), "positions 3: expected 'last', 'all' or numbers"),
        (one_edit('edit = "replace"\ndonor = "it"\npositions = "first"'), "positions 'first': expected"),
        (one_edit('edit = "replace"\ndonor = "it"\npositions = [0.5]'), r"positions is \[0.5\], expected"),
        (one_edit('edit = "replace"\ndonor = "it"\npositions = []'), r"positions \(\): expected"),
        (one_edit('edit = "replace"\nvector = "zeros"\nsite = "head"'), "site 'head' is unknown; choose state"),
        (one_edit('edit = "replace"\nvector = "zeros"\nsite = 1'), "site 1 is unknown; choose state"),
        (one_edit('edit = "replace"\nvector = "zeros"\nsite = "mlp"'), "an edit at site 'mlp' needs layers"),
        (one_edit('edit = "replace"\nvector = "zeros"\nlayers = [3]'), "an edit at site 'state' takes no layers"),
        (one_edit('edit = "replace"\nvector = "zeros"\nlayers = 3'), "layers is 3, expected a list of blocks"),
        (one_edit('edit = "replace"\ndonor = "it"\nsite = "mlp"\nlayers = [3]'), "'v': .* names the donor 'it'"),
        (one_edit('edit = "add"\nvector = "zeros"\nsweep = { scale = 2 }'), "'v': sweep.scale is 2, expected a list"),
        (
            one_edit('edit = "add"\nvector = "zeros"\nsweep = { scale = [] }'),
            r"'v': sweep.scale is \[\], expected a list",
        ),
        (one_edit('edit = "add"\nvector = "zeros"\nsweep = { wieght = [1] }'), "edit 'add' has a key 'wieght'"),
        (one_edit('edit = "add"\nvector = "zeros"\nsweep = 2'), "variant 'v': sweep is 2, expected a table"),
        (2 * (one_edit('edit = "replace"\ndonor = "it"') + "\n"), "variant 'v': the name is taken"),
        (one_edit('edit = "replace"\ndonor = "it"').replace('"v"', '"none"'), "variant 'none': the name is taken"),
        (one_edit('edit = "matched_norm"\nsweep = { seed = [1, 1] }'), r"variant 'v\[seed=1\]': the name is taken"),
    ],
)
def test_an_error_names_the_file_and_the_key(written, text, words):
    path = written(text)
    with pytest.raises(InputError, match=words) as caught:
        read_sweep(path, WIDTH)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value).rstrip()


def test_a_description_that_is_not_there():
    with pytest.raises(InputError, match=r"none\.toml: no such file; give a sweep as .toml or .py"):
        read_sweep("none.toml", WIDTH)
