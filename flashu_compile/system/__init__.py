"""What the process and its operating system give: paths, drafts of files, threads, and the settings of libraries.

`paths` knows homes, caches and current directories, and nothing else does; `drafts` makes folders for unfinished work;
`threads` says how many threads compute, `memory` how much memory there is, both by the limits of `groups`; `mapped`
keeps tensors in files instead; `libraries` sets what libraries read from the environment; `autocast` switches
PyTorch's off. Imports what lies flat, and no other folder of the package.
"""
