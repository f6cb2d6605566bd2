"""The recipes that whole models are tested under."""

import masked_kernels as mk

RECIPES = {
    "edge_popup": mk.recipes.edge_popup(),
    "one_layer": mk.recipes.one_layer(0.3),
    "max_layer_padding": mk.recipes.max_layer_padding(),
    "random_padding": mk.recipes.random_padding(1e-2),
    "aligned": mk.recipes.random_padding(1e-2, align=True),
    "rand": mk.recipes.random_padding(1e-2, mode="rand", seeded=True),
    "two of four": mk.recipes.edge_popup(rule=mk.NM(2, 4), seeded=True),
    "self_masking": mk.recipes.self_masking(),
    "piggyback": mk.recipes.piggyback(),
}
