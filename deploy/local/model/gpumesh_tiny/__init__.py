"""Makes `gpumesh-tiny`, the model that ships with gpumesh: corpus, tokenizer, training, GGUF export, evaluation."""
