import pytest

from gskd.errors import GSKDError, near_names


def test_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="x: found 1"):
        raise GSKDError("x: found 1")


def test_near_name_is_offered() -> None:
    assert near_names("wieght", ["weight", "loss"]) == "; did you mean 'weight'?"


def test_nearest_comes_first_and_no_more_than_asked() -> None:
    clause = near_names("layer1", [f"layer{i}" for i in range(9)], most=3)
    assert clause.startswith("; did you mean 'layer1'")
    assert clause.count("'") == 6


def test_dotted_name_is_found_by_its_tail() -> None:
    known = ["encoder.stem.conv", "network.backbone.blocks.classifier_head_of_the_decoder.aspp"]
    assert "classifier_head_of_the_decoder.aspp" in near_names("aspp", known)


def test_lists_what_is_known_where_nothing_is_near() -> None:
    assert near_names("zzz", ["alpha", "beta"]) == "; known: 'alpha', 'beta'"
    assert near_names("zzz", "abcdefgh", most=3) == "; known: 'a', 'b', 'c', ..."


def test_nothing_known_and_odd_names() -> None:
    assert near_names("zzz", []) == ""
    assert near_names("", ["alpha"]) == "; known: 'alpha'"
    assert near_names("alpa", iter(["alpha", "alpha"])) == "; did you mean 'alpha'?"
