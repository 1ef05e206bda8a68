"""How vectors of many sites are summed so that only the sum is known: plan, encoding, cryptography, protocol."""
