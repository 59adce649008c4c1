"""How the table of instructions is filled."""


def entry(table, names, modifiers=""):
    """Decorates a function of a machine and an instruction: it executes those of these names with these modifiers."""

    def add(function):
        for name in names.split():
            assert name not in table, f"{name} is in the table already"
            table[name] = function, set(modifiers.split())
        return function

    return add
