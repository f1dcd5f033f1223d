"""The repository as a package, for tools that follow relative imports between its folders.

Programs import `tinydm`, see tinydm/__init__.py.
"""
