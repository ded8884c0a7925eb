def render(*args):
    return "<html></html>\n"
