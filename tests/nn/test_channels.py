import pytest

from mnv2_jax.nn.channels import make_divisible


@pytest.mark.parametrize(
    ("value", "options", "expected"),
    [
        (32, {}, 32),
        (32 * 0.35, {}, 16),  # 8 would be 28 % less
        (24 * 0.35, {}, 8),
        (36, {}, 40),  # halves go up
        (1, {}, 8),
        (3.2, {"divisor": 4}, 4),
        (9, {"min_value": 16}, 16),
    ],
)
def test_rounds_to_the_nearest_multiple_but_not_ten_per_cent_down(value, options, expected):
    assert make_divisible(value, **options) == expected


@pytest.mark.parametrize("divisor", [4, 8])
def test_is_a_multiple_never_ten_per_cent_down(divisor):
    for value in range(1, 2000, 7):
        channels = make_divisible(value * 0.7, divisor)
        assert channels % divisor == 0
        assert channels >= 0.9 * value * 0.7
