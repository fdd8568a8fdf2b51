"""How an attack searches: batched values and gradients, starting directions, descent on the radius."""
