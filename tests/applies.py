"""The zoo: apply functions of every kind, small enough to differentiate twice."""

import applies_control as applies_control
import applies_dots as applies_dots
import applies_frameworks as applies_frameworks
from zoo import APPLIES as APPLIES
from zoo import Case as Case
