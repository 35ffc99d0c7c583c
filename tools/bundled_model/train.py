"""Trains the model that ships in nanovllm/assets/bundled_model: a byte-level BPE tokenizer and a small Qwen3.

    python tools/bundled_model/train.py --out DIR

Reads text.txt beside this file and writes a Hugging Face checkpoint without its card; no network, no GPU. The model
should know its text by heart: greedy continuations are then readable, and the best token leads by so much that no
rounding error changes it, which is what exact tests need.

About 8 minutes on one core of an x86-64 server (--steps and --threads change that). The shipped files were made with
the defaults on Python 3.11.7, torch 2.13.0+cpu, transformers 5.23.0, tokenizers 0.23.3. The same command on other
versions or another processor gives an equally good model, but not the same bytes.
"""

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3Config, Qwen3ForCausalLM

TEXT = Path(__file__).with_name("text.txt")
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 512
MAX_POSITIONS = 2048
# (crops in a batch, tokens in a crop): long crops teach what far context decides, short ones to continue short prompts.
CROP_SHAPES = ((4, 768), (48, 48))
SENTENCE_STARTS_SHARE = 0.5  # of the crops; people write prompts that begin a sentence


def train_tokenizer(text: str) -> Tokenizer:
    """A byte-level BPE: the end-of-text token is id 0, the 256 bytes follow, then the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


class CropSampler:
    """Draws crops of the text that begin at any word, as a prompt would: without the space before the word.

    The passages form a ring, each followed by the end-of-text token and the next passage. So a model that is told to
    ignore the end of a passage still has a definite continuation.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, generator: torch.Generator) -> None:
        self.generator = generator
        self.ring: list[int] = []
        self.starts: list[tuple[list[int], int]] = []  # (a word's tokens without its space, the ring's index after it)
        self.sentence_starts: list[int] = []  # indices into starts
        for passage in text.strip().split("\n\n"):
            begins_sentence = True
            # Words and newlines: the pre-tokenizer always splits there, so tokens never cross these borders.
            for word in re.findall(r" ?[^ \n]+|\n", passage):
                self.ring += tokenizer.encode(word).ids
                if word == "\n":
                    begins_sentence = True
                    continue
                if begins_sentence:
                    self.sentence_starts.append(len(self.starts))
                self.starts.append((tokenizer.encode(word.lstrip()).ids, len(self.ring)))
                begins_sentence = word[-1] in ".:;?!"
            self.ring.append(tokenizer.token_to_id(END_OF_TEXT))

    def crop(self, start: int, length: int) -> list[int]:
        """`length` tokens from the start-th word on."""
        tokens, after = self.starts[start]
        wrapped = self.ring[after : after + length]
        return (tokens + wrapped + self.ring)[:length]

    def draw(self, batch_size: int, length: int) -> Tensor:  # [batch_size, length]
        crops = []
        for _ in range(batch_size):
            if torch.rand((), generator=self.generator) < SENTENCE_STARTS_SHARE:
                index = int(torch.randint(len(self.sentence_starts), (), generator=self.generator))
                start = self.sentence_starts[index]
            else:
                start = int(torch.randint(len(self.starts), (), generator=self.generator))
            crops.append(self.crop(start, length))
        return torch.tensor(crops)


def model_config() -> Qwen3Config:
    """The architecture. head_dim is not hidden_size / num_attention_heads, as in the real Qwen3-0.6B."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,  # a padding row of the embedding would be held at zero; the row of id 0 is a token's
    )


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up over 50 steps, then half a cosine down to a hundredth of the peak."""
    warm_up = min(1.0, (step + 1) / 50)
    return peak * warm_up * (0.505 + 0.495 * math.cos(math.pi * step / num_steps))


def train(model: Qwen3ForCausalLM, sampler: CropSampler, num_steps: int, peak_learning_rate: float) -> None:
    """Next-token prediction with AdamW; a step takes one batch of each crop shape in turn."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    progress = tqdm(range(num_steps), desc="train", unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, peak_learning_rate)
        crops = sampler.draw(*CROP_SHAPES[step % len(CROP_SHAPES)])
        logits = model(input_ids=crops[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), crops[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def round_to_bfloat16(model: Qwen3ForCausalLM) -> None:
    """Rounds every weight to the nearest bfloat16, in place; they stay float32 tensors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())


def loss_over_the_text(model: Qwen3ForCausalLM, sampler: CropSampler) -> float:
    """Mean cross-entropy in nats of every token of the text that has at least 128 tokens before it."""
    context, length = 128, 384
    ring = sampler.ring + sampler.ring[:length]

    def windows() -> Iterator[list[int]]:
        for start in range(0, len(sampler.ring), length - context):
            yield ring[start : start + length]

    losses = []
    model.eval()
    with torch.no_grad():
        for window in windows():
            tokens = torch.tensor([window])
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")[context - 1 :])
    return torch.cat(losses).mean().item()


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the checkpoint. Weights are stored as bfloat16, config.json says float32: loading widens them exactly."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.bfloat16() for name, parameter in model.named_parameters()}  # tied lm_head appears once
    (out / "model.safetensors").write_bytes(to_safetensors(weights, metadata={"format": "pt"}))
    write_json(
        out / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": model.config.hidden_size,
            "intermediate_size": model.config.intermediate_size,
            "num_hidden_layers": model.config.num_hidden_layers,
            "num_attention_heads": model.config.num_attention_heads,
            "num_key_value_heads": model.config.num_key_value_heads,
            "head_dim": model.config.head_dim,
            "hidden_act": model.config.hidden_act,
            "rms_norm_eps": model.config.rms_norm_eps,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "dtype": "float32",
        },
    )
    write_json(
        out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "do_sample": False}
    )
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": MAX_POSITIONS,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model and write it as a Hugging Face checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; made if missing")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="its peak (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the crops (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    text = TEXT.read_text(encoding="utf-8")
    tokenizer = train_tokenizer(text)
    sampler = CropSampler(text, tokenizer, torch.Generator().manual_seed(arguments.seed))
    model = Qwen3ForCausalLM(model_config())
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(text)} characters, {len(sampler.ring)} tokens; {num_parameters} parameters")

    train(model, sampler, arguments.steps, arguments.learning_rate)
    round_to_bfloat16(model)
    print(f"loss over the text, on the rounded weights: {loss_over_the_text(model, sampler):.5f} nats a token")
    save(model, tokenizer, arguments.out)
    print(f"written to {arguments.out}; check the margins: python -m tools.bundled_model.check --model {arguments.out}")


if __name__ == "__main__":
    main()
