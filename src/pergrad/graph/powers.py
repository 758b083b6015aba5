"""Whose each number of a backward pass is, read off passes whose seeds are powers of two.

Owns: the seeds, the decoding of what comes back, and layouts of what was decoded.
Does not know: what is run: a graph, or one node of it.

Backward is linear in the seed: an element that depends on the loss of one example alone is
multiplied by exactly that example's seed. Seeds that are powers of two (or signs, where float16
leaves no range) make this exact to the bit, in every dtype, so the seeds spell out the number of
the example, digit by digit. An element that comes back as anything else mixes examples.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import TypeVar

import torch
from torch import Tensor

from pergrad.graph.layout import NOBODY, Layout, compressed, constant, regular_pattern

MANY = -2  # several examples meet in this element
UNSEEN = -3  # the element is not a number, so its owner cannot be read

Place = TypeVar("Place")
# What stands at some places for these seeds of the examples; see `parts`.
Run = Callable[[Tensor, list[Place]], Mapping[Place, Tensor | None]]


def ones(examples: int) -> Tensor:
    """The seeds of a plain pass."""
    return torch.ones(examples, dtype=torch.float64, device="cpu")


def owners_of(
    run: Run[Place], plain: Mapping[Place, Tensor | None], examples: int, narrow: bool
) -> dict[Place, Tensor]:
    """Whose each element is: an example, NOBODY's, or of several examples (MANY).

    `plain` is what a run of `ones` returned; `narrow` says that there are float16 numbers.
    """
    owners = by_powers(run, plain, examples, narrow)
    # A Function whose backward is no linear map, or a number too small for its dtype, is no power
    # of two times what it was, though no other example has a part in it.
    doubtful = {place: plain[place] for place, owner in owners.items() if (owner == MANY).any()}
    if doubtful:
        for place, owner in _by_masks(run, doubtful, examples).items():
            owners[place] = torch.where(owners[place] == MANY, owner, owners[place])
    return owners


def _digits(examples: int, narrow: bool) -> tuple[int, int]:
    """(base, how many digits a number of an example has)."""
    base, digits = 2 if narrow else 16, 1
    while base**digits < examples:
        digits += 1
    return base, digits


def _seeds(digit: Tensor, narrow: bool) -> Tensor:
    return (1.0 - 2.0 * digit) if narrow else 2.0**digit


def by_powers(
    run: Run[Place], plain: Mapping[Place, Tensor | None], examples: int, narrow: bool
) -> dict[Place, Tensor]:
    """Owners by seeds that spell the examples' numbers in powers of two, several digits at once."""
    places = list(plain)
    base, digits = _digits(examples, narrow)
    owners = {place: _start(value) for place, value in plain.items()}
    numbers = torch.arange(examples, device="cpu")
    for at in range(digits):
        seen = run(_seeds((numbers // base**at) % base, narrow), places)
        for place, owner in owners.items():
            value = _read(plain[place], seen[place], narrow)
            alive = owner >= 0
            owner[alive & (value < 0)] = MANY
            owner[(owner == NOBODY) & _differs(plain[place], seen[place])] = MANY
            still = owner >= 0
            owner[still] += value[still] * base**at
    # Cancellation could imitate a digit; a last pass with random seeds would have to agree too.
    generator = torch.Generator().manual_seed(20)
    choice = torch.randint(0, base, (examples,), generator=generator, device="cpu")
    seen = run(_seeds(choice, narrow), places)
    for place, owner in owners.items():
        value = _read(plain[place], seen[place], narrow)
        alive = owner >= 0
        expected = choice[owner.clamp(0, max(examples - 1, 0))]
        owner[alive & ((owner >= examples) | (value != expected))] = MANY
        owner[(owner == NOBODY) & _differs(plain[place], seen[place])] = MANY
    return owners


def hold(
    run: Run[Place],
    plain: Mapping[Place, Tensor | None],
    layouts: Mapping[Place, Layout],
    examples: int,
) -> bool:
    """Whether every element follows the example that it followed before.

    A pass less than to find out which, and no decoding. Numbers are dealt to the examples at
    random, so that no cancellation of the model's own imitates a digit. Not for float16.
    """
    generator = torch.Generator().manual_seed(23)
    numbers = torch.randperm(examples, generator=generator, device="cpu")
    base, digits = _digits(examples, narrow=False)
    if not all(value is None or bool(torch.isfinite(value).all()) for value in plain.values()):
        return False
    for at in range(digits):
        seeds = 2.0 ** ((numbers // base**at) % base)
        seen = run(seeds, list(plain))
        if not all(_follow(plain[p], seen[p], seeds, layouts[p]) for p in plain):
            return False
    return True


def _follow(plain: Tensor | None, seen: Tensor | None, seeds: Tensor, layout: Layout) -> bool:
    """Whether a value is the plain one times the owner's seed, and nobody's is zero."""
    if plain is None or seen is None:
        return plain is seen
    factor = times(seeds, layout, nobody=0.0).to(plain)
    if plain.dim() > len(layout.shape):  # a complex number as two
        factor = factor.unsqueeze(-1)
    return torch.equal(seen, plain * factor) and bool(torch.isfinite(seen).all())


def times(seeds: Tensor, layout: Layout, nobody: float) -> Tensor:
    """The seed of each element's example, as compressed as the layout."""
    return torch.where(layout.owner < 0, nobody, seeds[layout.owner.clamp_min(0)])


def _by_masks(
    run: Run[Place], plain: Mapping[Place, Tensor | None], examples: int
) -> dict[Place, Tensor]:
    """Owners by seeds of one and zero: an element that follows one example is as it was where the
    example is in, and zero where it is out, whatever a backward does with its numbers.
    """
    places = list(plain)
    owners = {place: _start(value) for place, value in plain.items()}
    numbers = torch.arange(examples, device="cpu")

    def look(inside: Tensor, told: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        seen = run(inside.double(), places)
        for place, owner in owners.items():
            before, after = plain[place], seen[place]
            if before is None or after is None:
                continue
            zero = (_real(after) == 0).cpu()
            owner[(owner == NOBODY) & ~zero] = MANY
            same = (_real(after) == _real(before)).cpu()
            owner[(owner >= 0) & ~same & ~zero] = MANY
            told(owner, same, zero)

    for at in range(max(1, (examples - 1).bit_length())):
        bit = (numbers >> at) % 2

        def set_bit(owner: Tensor, same: Tensor, zero: Tensor, bit: int = 1 << at) -> None:
            owner[(owner >= 0) & same] += bit

        def without(owner: Tensor, same: Tensor, zero: Tensor, bit: int = 1 << at) -> None:
            owner[(owner >= 0) & (zero != ((owner & bit) > 0))] = MANY

        look(bit, set_bit)
        look(1 - bit, without)
    generator = torch.Generator().manual_seed(22)
    for _ in range(2):
        inside = torch.randint(0, 2, (examples,), generator=generator, device="cpu")

        def agree(owner: Tensor, same: Tensor, zero: Tensor, inside: Tensor = inside) -> None:
            expected = inside[owner.clamp(0, examples - 1)] > 0
            owner[(owner >= 0) & ((owner >= examples) | (same != expected))] = MANY

        look(inside, agree)
    return owners


def whole(shape: tuple[int, ...], owner: Tensor) -> Tensor:
    """One owner for the two parts of each complex number."""
    if owner.dim() == len(shape) or owner.numel() != 2 * prod(shape):
        return owner
    one, two = owner.unbind(-1)
    worst = torch.minimum(one, two)
    differ = (one != two) & (one != NOBODY) & (two != NOBODY) & (worst >= 0)
    total = torch.where(worst < NOBODY, worst, torch.maximum(one, two))
    return torch.where(differ, MANY, total)


def _start(value: Tensor | None) -> Tensor:
    if value is None:
        return torch.full((1,), NOBODY, dtype=torch.int64, device="cpu")
    value = _real(value)
    owner = torch.zeros(value.shape, dtype=torch.int64, device="cpu")
    owner[(value == 0).cpu()] = NOBODY
    owner[~torch.isfinite(value).cpu()] = UNSEEN
    return owner


def parts(value: Tensor | None) -> Tensor | None:
    """With all elements; a complex number as two: its parts may follow different examples."""
    if value is None:
        return None
    value = value if value.layout is torch.strided else value.to_dense()
    if not value.is_complex():
        return value
    return torch.view_as_real(value.resolve_conj())


def _real(value: Tensor) -> Tensor:
    """Half precision widened without rounding."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _read(plain: Tensor | None, seen: Tensor | None, narrow: bool) -> Tensor:
    """The digit that each element shows; -1 where it shows none."""
    if plain is None or seen is None:
        return torch.full((1,), -1, dtype=torch.int64, device="cpu")
    before, after = _real(plain), _real(seen)
    if narrow:
        digit = torch.where(after == before, 0, torch.where(after == -before, 1, -1))
        return digit.cpu()
    one, low = torch.frexp(before)
    two, high = torch.frexp(after)
    shift = (high - low).long()
    good = (one == two) & (shift >= 0) & (shift < 16)
    return torch.where(good, shift, -1).cpu()


def _differs(plain: Tensor | None, seen: Tensor | None) -> Tensor:
    if plain is None or seen is None:
        return torch.full((1,), seen is not plain, device="cpu")
    return (_real(seen) != 0).cpu()


def layout_of(shape: tuple[int, ...], owner: Tensor, examples: int) -> Layout | None:
    """What was decoded, as a layout; None where examples meet in one element."""
    owner = whole(shape, owner)
    if owner.numel() == 0:
        return constant(shape, NOBODY)
    if bool((owner == MANY).any()):
        return None
    if owner.numel() != prod(shape):
        return constant(shape, NOBODY)
    if bool((owner == UNSEEN).any()):
        return _complete(shape, owner, examples)
    for dim in reversed(range(len(shape))):  # elements without gradient fit any owner
        known = owner != NOBODY
        highest = owner.amax(dim, keepdim=True)
        lowest = torch.where(known, owner, highest).amin(dim, keepdim=True)
        if torch.equal(highest, lowest):
            owner = highest
    return compressed(shape, owner)


def _complete(shape: tuple[int, ...], owner: Tensor, examples: int) -> Layout | None:
    """Elements that are not numbers: only a regular pattern that fits all others may tell."""
    total = owner.numel()
    flat = owner.reshape(-1)
    known = flat >= 0
    inner = 1
    candidates = [inner for inner in range(1, total // examples + 1)
                  if total % (inner * examples) == 0]  # fmt: skip
    for inner in reversed(candidates):
        ideal = (torch.arange(total, device="cpu") // inner) % examples
        if torch.equal(ideal[known], flat[known]):
            assert regular_pattern(ideal) is not None
            return compressed(shape, ideal.reshape(shape))
    return None
