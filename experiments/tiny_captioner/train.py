"""Train the bundled captioner on CIFAR-10: ``python -m experiments.tiny_captioner.train --data train.parquet``.

The vision tower is frozen; the projector and the language model learn the sentences of ``sentences.py``, next
token by next token. bf16 weights with fp32 masters, an exponential average of them, a checkpoint a minute; the same
line again resumes from it. For most of the training each picture shows a quarter of its patches, which halves
the time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from experiments.tiny_backbones.train import MasterWeights, rate_at
from experiments.tiny_captioner.data import DRAWS, prepared
from experiments.tiny_captioner.model import PATCHES, captioner

EPOCHS, BATCH, RATE = 2.5, 64, 2e-3
KEEP, ALL_PATCHES_FROM = 16, 0.9  # patches shown up to this share of all steps


class Speaker(nn.Module):
    """The part of the captioner that learns: vision tokens [B, 64, 128] and sentences [B, T] in, the loss out."""

    def __init__(self, model: nn.Module, start: int, pad: int) -> None:
        super().__init__()
        self.project, self.llama, self.head = (
            model.model.multi_modal_projector,
            model.model.language_model,
            model.lm_head,
        )
        self.start, self.pad = start, pad

    def forward(self, tokens: Tensor, sentences: Tensor, keep: int = PATCHES) -> Tensor:
        """Mean cross-entropy of the words of ``sentences``, which end with ``</s>`` and padding, in nats."""
        count, length = sentences.shape
        positions = torch.rand(count, PATCHES).topk(keep).indices.sort().values
        seen = tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[-1]))
        words = self.llama.embed_tokens(sentences)
        first = self.llama.embed_tokens(torch.full((count, 1), self.start))
        x = torch.cat([first, self.project(seen), words[:, :-1]], dim=1)
        after = torch.arange(PATCHES + 1, PATCHES + length).expand(count, -1)
        places = torch.cat([torch.zeros(count, 1, dtype=torch.long), positions + 1, after], dim=1)
        hidden = self.llama(
            inputs_embeds=x, position_ids=places, attention_mask=torch.ones_like(places), use_cache=False
        ).last_hidden_state
        logits = self.head(hidden[:, keep:]).float()
        return F.cross_entropy(logits.flatten(0, 1), sentences.flatten(), ignore_index=self.pad)


def encode(sentences: list[list[str]], tokenizer: object) -> Tensor:
    """Word numbers [draws, N, T] int64, each sentence ended by ``</s>`` and padded."""
    index = tokenizer.get_vocab()  # type: ignore[attr-defined]
    longest = max(len(s.split()) for draw in sentences for s in draw) + 1
    found = torch.full((len(sentences), len(sentences[0]), longest), tokenizer.pad_token_id)  # type: ignore[attr-defined]
    for rows, draw in zip(found, sentences, strict=True):
        for row, text in zip(rows, draw, strict=True):
            numbers = [index[word] for word in text.split()] + [index["</s>"]]
            row[: len(numbers)] = torch.tensor(numbers)
    return found


def train(data: Path, work: Path, epochs: float = EPOCHS, out: Path | None = None) -> Path:
    """Train, or go on training; returns the folder with the exported model."""
    work.mkdir(parents=True, exist_ok=True)
    sentences, tokens = prepared(data, work)
    torch.manual_seed(42)
    model, processor = captioner(sorted({word for draw in sentences for s in draw for word in s.split()}))
    tokenizer = processor.tokenizer
    words = encode(sentences, tokenizer)
    speaker = Speaker(model, tokenizer.bos_token_id, tokenizer.pad_token_id).to(torch.bfloat16).train()
    weights = MasterWeights(speaker, RATE)
    steps, step, checkpoint = int(epochs * len(tokens) / BATCH), 0, work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        step = saved["step"]
        weights.adam.load_state_dict(saved["adam"])
        with torch.no_grad():
            for kind in ("masters", "average"):
                for ours, theirs in zip(getattr(weights, kind), saved[kind], strict=True):
                    ours.copy_(theirs)
            for live, master in zip(weights.live, weights.masters, strict=True):
                live.copy_(master)
    out = out or work / "model"

    def save() -> None:
        state = {
            "step": step, "adam": weights.adam.state_dict(),
            "masters": [m.detach() for m in weights.masters], "average": weights.average,
        }  # fmt: skip
        torch.save(state, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").rename(checkpoint)

    last_saved, losses = time.monotonic(), []
    with tqdm(total=steps, initial=step, desc="Captioner", unit="step") as bar:
        while step < steps:
            epoch, place = divmod(step, len(tokens) // BATCH)
            order = np.random.default_rng(1000 + epoch).permutation(len(tokens))
            index = np.sort(order[place * BATCH : (place + 1) * BATCH])
            batch = words[epoch % DRAWS, index]
            batch = batch[:, : int((batch != tokenizer.pad_token_id).sum(1).max())]
            torch.manual_seed(step)
            keep = KEEP if step < ALL_PATCHES_FROM * steps else PATCHES
            loss = speaker(torch.from_numpy(tokens[index]).to(torch.bfloat16), batch, keep)
            if not torch.isfinite(loss):
                raise SystemExit(f"The loss is {loss.item()} at step {step}; the last checkpoint is sound.")
            loss.backward()
            weights.step(rate_at(step / steps, RATE), min(0.998, (1 + step) / (10 + step)))
            losses.append(loss.item())
            step += 1
            bar.update()
            if time.monotonic() - last_saved > 60 or step == steps:
                bar.set_postfix(loss=f"{np.mean(losses[-50:]):.3f}")
                save()
                last_saved = time.monotonic()
    export(model, processor, speaker, weights.averaged(), out)
    return out


def export(model: nn.Module, processor: object, speaker: nn.Module, averaged: dict[str, Tensor], out: Path) -> None:
    """Write the model with the averaged weights as float16 safetensors, and its processor."""
    speaker.float().load_state_dict(averaged)
    model.half().save_pretrained(out)  # type: ignore[operator]
    processor.save_pretrained(out)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's train split (parquet, image + label)")
    parser.add_argument("--work", type=Path, default=Path(".work/tiny_captioner"))
    parser.add_argument("--out", type=Path, help="where the model goes; by default WORK/model")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.data, args.work, args.epochs, args.out)


if __name__ == "__main__":
    main()
