"""Write text with a model that was trained here.

    python -m tools.sample logs/RUN --prompt "Return the "

RUN is the run's id: its model is logs/RUN.pt. Models of the built-in corpus speak bytes and need
nothing else; models of FineWeb speak GPT-2 tokens and need tiktoken's GPT-2 ranks.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import recipes
from data.tokenizer import tokenizer_of
from model import GPT
from trainer import checkpoint


def load_model(run: str) -> tuple[GPT, recipes.Recipe]:
    """The model of `logs/RUN`, with or without its ending, or of a checkpoint. Raises
    FileNotFoundError, ValueError."""
    path = Path(run)
    if path.suffix not in (".pt", ".ckpt"):
        path = path.with_name(path.name.removesuffix(".txt") + ".pt")
    state = checkpoint.load(path)
    recipe = recipes.from_dict(state["recipe"])
    model = GPT(recipe.model)
    model.load_state_dict(state["model"])
    model.set_phase(recipes.eval_phase(state["step"], recipe))
    return model.eval(), recipe


def next_token(logits_V: torch.Tensor, temperature: float, top_k: int, top_p: float,
               generator: torch.Generator) -> int:
    """Draw from the softmax of logits_V / temperature: of the top_k likeliest tokens (0: of all),
    those that have together a probability of top_p. temperature 0: the likeliest."""
    if temperature == 0:
        return int(logits_V.argmax())
    top, index = logits_V.topk(min(top_k or len(logits_V), len(logits_V)))
    probs = (top / temperature).softmax(0)
    before = probs.cumsum(0) - probs
    probs[before >= top_p] = 0  # never the first, which has nothing before it
    return int(index[torch.multinomial(probs, 1, generator=generator)])


@torch.compiler.set_stance("force_eager")  # every length would be a graph of its own
@torch.no_grad()
def tokens_after(model: GPT, prompt: list[int], num_tokens: int, temperature: float, seed: int,
                 top_k: int, top_p: float) -> Iterator[int]:
    """Up to num_tokens tokens that continue those of `prompt`; ends at the end of a document.

    The whole row is computed for each token: keys and values are not kept. Sampling is on the CPU.
    """
    config, device = model.config, next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        window = torch.tensor([tokens[-config.seq_len:]], dtype=torch.int32, device=device)
        logits_V = model.logits(model.hidden(window)[:, -1])[0, :config.vocab_size].float().cpu()
        token = next_token(logits_V, temperature, top_k, top_p, generator)
        if token == tokenizer_of(config.vocab_size).bos_id:
            return
        tokens.append(token)
        yield token


def stream(model: GPT, prompt: str, num_tokens: int, temperature: float, seed: int,
           top_k: int = 50, top_p: float = 1.0, stop: Sequence[str] = ()) -> Iterator[str]:
    """As `generate`, piece by piece: whole characters, and nothing that a stop may begin with."""
    tokenizer = tokenizer_of(model.config.vocab_size)
    encode, decode = tokenizer.encoder(), tokenizer.decoder()
    tokens = [tokenizer.bos_id, *map(int, encode(prompt))]
    training = model.training
    model.eval()
    pending: list[int] = []  # tokens of a character that is not whole
    held = ""
    for token in tokens_after(model, tokens, num_tokens, temperature, seed, top_k, top_p):
        pending.append(token)
        text = decode(pending)
        if text.endswith("\ufffd") and len(pending) < 4:
            continue
        held, pending = held + text, []
        ends = [place for place in map(held.find, stop) if place >= 0]
        if ends:
            held = held[:min(ends)]
            break
        keep = max((n for word in stop for n in range(1, len(word)) if held.endswith(word[:n])),
                   default=0)
        yield held[:len(held) - keep]
        held = held[len(held) - keep:]
    else:
        held += decode(pending)
    model.train(training)
    yield held


def generate(model: GPT, prompt: str, num_tokens: int, temperature: float, seed: int,
             top_k: int = 50, top_p: float = 1.0, stop: Sequence[str] = ()) -> str:
    """Continue `prompt` by up to num_tokens tokens, drawn as next_token says; ends at the end of a
    document, or before one of the words of `stop`."""
    return "".join(stream(model, prompt, num_tokens, temperature, seed, top_k, top_p, stop))


def read_prompt(prompt: str, file: str | None) -> str:
    """The prompt, or the text of a file ("-": standard input)."""
    if file is None:
        return prompt
    if prompt:
        raise ValueError("--prompt_file: expected no --prompt beside it")
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt_file {file}: not UTF-8 ({error.reason} at byte "
                         f"{error.start})") from None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="logs/RUN of a training run, or a checkpoint of one")
    parser.add_argument("--prompt", default="", help="what the text starts with")
    parser.add_argument("--prompt_file", help="a file with the prompt; - for standard input")
    parser.add_argument("--num_tokens", type=int, default=300, help="how many tokens to write")
    parser.add_argument("--num_samples", type=int, default=1, help="texts, of seeds that count up")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest always")
    parser.add_argument("--top_k", type=int, default=50, help="of so many tokens; 0: of all")
    parser.add_argument("--top_p", type=float, default=1.0,
                        help="of the likeliest with this probability together")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                        help="end before this text; may be given several times")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        for name, ok, expected in (
                ("temperature", 0 <= args.temperature < math.inf, "0 or more"),
                ("num_tokens", args.num_tokens >= 1, "a whole number from 1"),
                ("num_samples", args.num_samples >= 1, "a whole number from 1"),
                ("top_k", args.top_k >= 0, "a whole number from 0"),
                ("top_p", 0 < args.top_p <= 1, "a number above 0, at most 1"),
                ("stop", all(args.stop), "a text that is not empty"),
                ("seed", args.seed >= 0, "0 or more")):
            if not ok:
                raise ValueError(f"--{name}: expected {expected}, got {getattr(args, name)}")
        prompt = read_prompt(args.prompt, args.prompt_file)
        model, recipe = load_model(args.run)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        count = len(tokenizer_of(recipe.model.vocab_size).encoder()(prompt)) + 1
        if count + args.num_tokens > recipe.model.seq_len:
            print(f"tools.sample: prompt and text have up to {count + args.num_tokens:,} tokens; "
                  f"the model sees the last {recipe.model.seq_len:,} at a time", file=sys.stderr)
        for sample in range(args.num_samples):
            if args.num_samples > 1:
                print(f"--- sample {sample + 1} of {args.num_samples}, seed {args.seed + sample}")
            print(prompt, end="", flush=True)
            for piece in stream(model, prompt, args.num_tokens, args.temperature,
                                args.seed + sample, args.top_k, args.top_p, args.stop):
                print(piece, end="", flush=True)
            print()
    except (ValueError, OSError) as error:  # no such model; no network for GPT-2's ranks
        print(f"tools.sample: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
