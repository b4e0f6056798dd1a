"""Write text with a model that was trained here.

    python -m tools.sample logs/RUN --prompt "Return the "

RUN is the run's id: its model is logs/RUN.pt. Models of the built-in corpus speak bytes and need
nothing else; models of FineWeb speak GPT-2 tokens and need tiktoken's GPT-2 ranks.
"""

import argparse
import math
import sys
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


@torch.compiler.set_stance("force_eager")  # every length would be a graph of its own
@torch.no_grad()
def generate(model: GPT, prompt: str, num_tokens: int, temperature: float, seed: int,
             top_k: int = 50) -> str:
    """Continue `prompt` by up to num_tokens tokens; ends at the end of a document.

    temperature 0 takes the likeliest token every time. Sampling is on the CPU, from `seed`.
    """
    config = model.config
    tokenizer = tokenizer_of(config.vocab_size)
    encode, decode = tokenizer.encoder(), tokenizer.decoder()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = [tokenizer.bos_id, *map(int, encode(prompt))]
    written: list[int] = []
    model.eval()
    for _ in range(num_tokens):
        window = torch.tensor([tokens[-config.seq_len:]], dtype=torch.int32, device=device)
        logits_V = model.logits(model.hidden(window)[:, -1])[0, :config.vocab_size].cpu()
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            top, index = logits_V.topk(min(top_k, config.vocab_size))
            chosen = torch.multinomial((top / temperature).softmax(0), 1, generator=generator)
            token = int(index[chosen])
        if token == tokenizer.bos_id:
            break
        tokens.append(token)
        written.append(token)
    model.train()
    return decode(written)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="logs/RUN of a training run, or a checkpoint of one")
    parser.add_argument("--prompt", default="", help="what the text starts with")
    parser.add_argument("--num_tokens", type=int, default=300, help="how many tokens to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest always")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        if not 0 <= args.temperature < math.inf:
            raise ValueError(f"--temperature: expected 0 or more, got {args.temperature}")
        if args.num_tokens < 1:
            raise ValueError(f"--num_tokens: expected a whole number from 1, got {args.num_tokens}")
        model, _ = load_model(args.run)
        print(args.prompt + generate(model, args.prompt, args.num_tokens, args.temperature,
                                     args.seed))
    except (ValueError, OSError) as error:  # no such model; no network for GPT-2's ranks
        print(f"tools.sample: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
