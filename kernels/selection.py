"""Selection: the places of what is chosen of a vector, in order, and how many they are.

    n = 0
    for i:                          in order
        if chosen_i: places_n = i, n = n + 1
    count = n

The rest of ``places`` is left as it is: whoever reads it knows ``count``.
"""

from __future__ import annotations

from xopt.kernels.emit import PrimFunc, argument, bind, dim, i64, local, prim_func, put, serial, when

VERSION = 1
NAME = "selection"


def build() -> PrimFunc:
    """The kernel over (chosen bool [N], places int64 [N], count int64 [1])."""

    def body() -> None:
        size = dim(None, "size")
        chosen = argument("chosen", (size,), "bool")
        places = argument("places", (size,), "int64")
        count = argument("count", (1,), "int64")
        found = local((1,), "int64")
        put(found, i64(0), 0)
        with serial(size) as place:

            def note() -> None:
                put(places, i64(place), bind(found[i64(0)]))
                put(found, found[i64(0)] + 1, 0)

            when(chosen[place], note)
        put(count, found[i64(0)], 0)

    return prim_func(NAME, body)
