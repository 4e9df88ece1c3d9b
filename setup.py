"""What setup.cfg cannot say: an editable install is found from the folder that holds the checkout, too.

setuptools makes it a finder that Python asks last, after all folders of sys.path. In the folder that holds a clone,
which `git clone` calls m2l2, those give the clone itself: without an __init__.py, so as a "namespace package" without
anything in it. Any package in site-packages goes before such a one, so the install gets one, which loads that of the
checkout. (To ask the finder first would also go before a checkout that PYTHONPATH names, or one's own folder.)
"""

import base64
import hashlib
from pathlib import Path
import zipfile

STAND_IN = '''\
"""In place of m2l2 in a checkout, which it loads; made by the checkout's setup.py."""
import importlib.util
import sys

_spec = importlib.util.spec_from_file_location('m2l2', {place!r})
sys.modules['m2l2'] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules['m2l2'])
'''


def add_stand_in(wheel, checkout):
  """Adds the package m2l2 that loads the one of `checkout` to an editable wheel."""
  with zipfile.ZipFile(wheel) as archive:
    files = {entry: archive.read(entry) for entry in archive.infolist()}
  text = STAND_IN.format(place=str(Path(checkout).resolve() / 'm2l2' / '__init__.py')).encode()
  digest = base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b'=').decode()
  line = f'm2l2/__init__.py,sha256={digest},{len(text)}\n'
  with zipfile.ZipFile(wheel, 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('m2l2/__init__.py', text)
    for entry, data in files.items():
      archive.writestr(entry, line.encode() + data if entry.filename.endswith('.dist-info/RECORD') else data)


if __name__ == '__main__':
  import setuptools
  from setuptools.command.editable_wheel import editable_wheel

  class WithStandIn(editable_wheel):
    def run(self):
      super().run()
      [wheel] = Path(self.dist_dir).glob('m2l2-*.whl')
      add_stand_in(wheel, Path(__file__).parent)

  setuptools.setup(cmdclass={'editable_wheel': WithStandIn})
