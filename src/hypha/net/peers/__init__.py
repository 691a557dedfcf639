"""Who is connected with this node, who may be, and how connections are made, bounded and given up.

- The same certificate on two machines: a number of each node travels in SNI; the connected one goes on while
  it answers (2 s), the other is turned away and told so over that connection, and both and the gateway say so
  once a minute at most; a probe sends none.
- The same certificate at two gateways: gateways ask each other (``FindDoubles``), before they let a node in
  and once a minute; who came later is cut. One that does not answer is not waited for.
- A refusal after the handshake: one line where multistream's greeting is due (``reasons.py``).
- A component with another role's certificate: is told at ``validate`` and ``run``: everybody else would
  refuse it.
"""
