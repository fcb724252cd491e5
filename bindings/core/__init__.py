"""What every public function and backend shares: segments, controls, the lowered problem, the registered
operators.
"""
