"""A small world of coloured shapes to train and score a text-to-image and question model on.

`scenes` draws prompts and scenes, `render` paints them, `language` words captions and questions,
and `scorer` (extra ``shapes``) finds the objects in a picture and judges it against its prompt.
Nothing here needs a deep-learning framework.
"""
