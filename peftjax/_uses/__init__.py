"""The equations that consume a weight linearly, one file each."""

from peftjax._uses._base import Use as Use
from peftjax._uses._conv import Conv as Conv
from peftjax._uses._dot import Dot as Dot
from peftjax._uses._gather import Gather as Gather
from peftjax._uses._named import Named as Named
from peftjax._uses._ragged import Ragged as Ragged
