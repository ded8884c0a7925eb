"""What the families here call their stacks: the language model, the image encoder and the diffusion head."""

LLM, SEMANTIC, HEAD = "llm", "semantic", "head"
