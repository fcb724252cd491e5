"""The method protocol: Layer and Step go in, a Plan comes out. For the author of a method.

Reading order: layer.py, plan.py (Plan, Method), batch_call.py (Part), plan_call.py (what a plan does to q, k
and v).
"""
