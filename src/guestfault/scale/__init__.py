"""How demand paging scales with vCPUs: a simulation that carries measured costs to 256 of them.

Two cores cannot show what happens at 256 vCPUs, and the machines that can are rare.  But the costs
of one fault can be measured anywhere, and what makes many vCPUs slow is known: locks that they all
take, and one of them under which every waiter is looked at for each wake-up.  So the simulation has
just these: it must first come out at what was published
(:mod:`~guestfault.scale.published`), and then says what a machine with other costs would do.
"""
