"""Continues a sentence with a compressed model, in stock transformers; optimum_prune is not imported."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt = sys.argv[1], sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
tokens = model.generate(
    **tokenizer(prompt, return_tensors="pt"), max_new_tokens=40, do_sample=False, repetition_penalty=1.2
)
print(f"\nThe pruned model writes: {tokenizer.decode(tokens[0], skip_special_tokens=True)}")
