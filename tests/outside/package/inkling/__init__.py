"""An invented family of models that draw and answer: a trunk, an eye and a painter."""
