"""Lets vLLM write behind some prompts: python served_by_vllm.py RESULT FOLDER PROMPTS, in an environment that has it."""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def main(result: str, folder: str, prompts: str) -> None:
    """Greedy tokens behind each prompt, and their log-probabilities."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True
    )
    asked = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": tokens} for tokens in json.loads(Path(prompts).read_text())]
    written = [output.outputs[0] for output in llm.generate(given, asked)]
    told = [
        [
            list(each.token_ids),
            [found[token].logprob for token, found in zip(each.token_ids, each.logprobs, strict=True)],
        ]
        for each in written
    ]
    Path(result).write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
