"""How an attack searches: starting directions, gradient descent on the radius, other libraries' attacks."""
