"""Settings refuse what they do not know, say the nearest right word, and name the place of a fault."""

import pytest
import yaml
from pydantic import Field

from palate.settings import PalateError, Settings, build, find, kinds, nearest, override, parse, read_yaml, value_of


class Inner(Settings):
    clip: float = Field(0.2, gt=0)
    """A range."""


class Outer(Settings):
    name: str = "x"
    """A name."""
    inner: Inner = Inner()
    """Nested."""


def test_unknown_key_gets_the_nearest_right_one() -> None:
    with pytest.raises(PalateError, match=r"stages\.2\.inner: there is no setting 'cilp'\. Did you mean 'clip'\?"):
        parse(Outer, {"inner": {"cilp": 0.1}}, "stages.2")


def test_wrong_type_names_place_and_value() -> None:
    with pytest.raises(PalateError, match=r"^inner\.clip: .*number.*'wide'"):
        parse(Outer, {"inner": {"clip": "wide"}})


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Outer().name = "y"


def test_infinity_is_not_a_setting() -> None:
    with pytest.raises(PalateError, match="finite"):
        parse(Inner, {"clip": float("inf")})


def test_nearest_is_silent_when_nothing_is_close() -> None:
    assert nearest("zebra", ["clip", "lam"]) == ""
    assert nearest("gama", ["gamma", "lam"]) == " Did you mean 'gamma'?"


def test_kinds_are_the_files_that_define_the_class() -> None:
    assert {"sft", "reward", "ppo"} <= set(kinds("algorithms"))
    assert "protocol" not in kinds("algorithms")


def test_unknown_kind_suggests_and_lists() -> None:
    with pytest.raises(ValueError, match=r"no algorithm is called 'poo'\. Did you mean 'ppo'\? Known: .*sft"):
        find("algorithms", "poo")


def test_a_kind_of_ones_own_is_loaded_by_module_and_name() -> None:
    assert find("algorithms", "palate.settings:Settings") is Settings
    with pytest.raises(ValueError, match="cannot load 'nowhere:Mine'"):
        find("algorithms", "nowhere:Mine")


def test_build_names_the_missing_kind() -> None:
    with pytest.raises(PalateError, match=r"stages\.0\.algorithm: 'kind' is missing"):
        build("algorithms", {"kl_coef": 0.1}, "stages.0.algorithm")


def test_override_reaches_by_number_and_by_name_and_leaves_the_original_alone() -> None:
    given = {"seed": 1, "stages": [{"name": "a", "x": {"y": 1}}, {"name": "b"}]}
    before = yaml.safe_dump(given)
    result = override(given, ["seed=2", "stages.0.x.y=0.5", "stages.b.z.w=[1, 2]"])
    assert result == {
        "seed": 2,
        "stages": [{"name": "a", "x": {"y": 0.5}}, {"name": "b", "z": {"w": [1, 2]}}],
    }
    assert yaml.safe_dump(given) == before


@pytest.mark.parametrize("assignment", ["seed", "=3", "stages.c.x=1", "stages.9.x=1", "seed.deep=1", "a={"])
def test_override_that_cannot_be_applied_is_refused(assignment: str) -> None:
    if assignment == "seed.deep=1":  # a number becomes a group; the settings class refuses it later, by place
        assert override({"seed": 1}, [assignment]) == {"seed": {"deep": 1}}
        return
    with pytest.raises(PalateError):
        override({"seed": 1, "stages": [{"name": "a"}]}, [assignment])


def test_yaml_faults_name_file_and_line(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a: 1\nb: c: 2\n")
    with pytest.raises(PalateError, match=r"run\.yaml:2: not valid YAML"):
        read_yaml(path)
    path.write_text("- 1\n")
    with pytest.raises(PalateError, match="expected a mapping"):
        read_yaml(path)
    with pytest.raises(PalateError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")


def bomb(levels: int = 9) -> str:
    """Nine lists of nine, each item the list before: 9^9 values from a kilobyte."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


MERGE_BOMB = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (bomb(), r"run\.yaml:6: its aliases grow to more than 100,000 values"),
        (MERGE_BOMB, r"run\.yaml:\d+: its aliases grow to more than 100,000 values"),
        (CHAIN, r"run\.yaml:\d+: it nests deeper than 64 levels"),
        ("a: &a [*a]", r"run\.yaml:1: an alias stands inside its own anchor"),
        ("a: 1\nb: &b\n  c: {d: *b}", r"run\.yaml:2: an alias stands inside its own anchor"),
        ("a: " + "[" * 100 + "]" * 100, r"run\.yaml:1: it nests deeper than 64 levels"),
        ("a: " + "[" * 50_000, r"run\.yaml:1: not valid YAML: it nests too deeply"),
        ("seed: 1\nname: x\nseed: 2", r"run\.yaml:3: the key 'seed' is there twice"),
        ("a: 1\nb: 2020-99-99", r"run\.yaml:1: not valid YAML: a value cannot be held: month"),
        ("a: 1\nb: \x07", r"run\.yaml:2: not valid YAML: special characters are not allowed"),
        ("a: !!python/object/apply:os.system ['true']", r"run\.yaml:1: not valid YAML: could not determine a constr"),
    ],
)
def test_yaml_that_would_do_harm_is_refused_in_one_line(tmp_path, text: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(PalateError, match=expected) as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["[" * 50_000, "[" * 100 + "]" * 100, "&a [*a]", "{x: 1, x: 2}", "2020-99-99"])
def test_a_value_of_the_command_line_is_read_by_the_same_rules(value: str) -> None:
    with pytest.raises(PalateError) as caught:
        override({}, [f"seed={value}"])
    assert "\n" not in str(caught.value)
    with pytest.raises(PalateError, match="'seed="):
        value_of(f"seed={value}")


def test_anchors_and_merges_may_be_used(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("base: &base {a: 1, b: 2}\none: {<<: *base, b: 3}\nmany: [*base, *base]\n")
    assert read_yaml(path) == {"base": {"a": 1, "b": 2}, "one": {"a": 1, "b": 3}, "many": [{"a": 1, "b": 2}] * 2}


@pytest.mark.parametrize(
    ("kind", "key"),
    [("ppo", "rollout_forward_batch_size"), ("kto", "forward_batch_size"), ("dpo", "reference_batch_size")],
)
def test_a_setting_that_is_gone_says_so_and_what_is_there_instead(kind: str, key: str) -> None:
    with pytest.raises(PalateError, match=rf"stages\.1\.algorithm: '{key}' is gone.*tokens_per_microbatch.*Delete"):
        build("algorithms", {"kind": kind, key: 64}, "stages.1.algorithm")
