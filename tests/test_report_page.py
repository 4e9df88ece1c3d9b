"""The page of `m2l2 evaluate --html` in a browser: its players switch at the same place. It leaves a picture.

Run it with `python -m pytest -m chromium`; M2L2_PAGE and M2L2_PICTURE name another page and where the picture goes.
"""

import base64
import json
import os
import pathlib
import shutil
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = os.environ.get('M2L2_PAGE', ROOT / '.github' / 'demo' / 'demo.html')

# Plays the first file, switches through all its players, and tells where the players were.
PROGRAM = '''
(async () => {
  const wait = ms => new Promise(done => setTimeout(done, ms));
  const pair = document.querySelector('.pair');
  const players = [...pair.querySelectorAll('audio')];
  const [reference, estimate] = players, last = players[players.length - 1];
  const button = pair.querySelector('button');
  const place = () => ({reference: reference.currentTime, estimate: estimate.currentTime,
                        last: last.currentTime,
                        playing: players.map(player => !player.paused).map(Number)});
  await reference.play();
  reference.currentTime = 1;
  await wait(1000);
  const before = place();
  button.click();
  await wait(100);
  const after = place();
  for (const player of players.slice(1)) {
    await wait(400);
    button.click();
  }
  await wait(100);
  const back = place();
  reference.pause();
  return {before, after, back, durations: [reference.duration, estimate.duration],
          broken: [...document.images].filter(image => !image.naturalWidth).length,
          wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
          pairs: document.querySelectorAll('.pair').length};
})()
'''


class Browser:
  """A headless Chromium, told what to do over a pair of pipes (the DevTools protocol)."""

  def __init__(self, folder):
    program = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    assert program, 'no Chromium is installed'
    (commands, self._commands), (self._answers, answers) = os.pipe(), os.pipe()
    self._process = subprocess.Popen(
        ['bash', '-c', f'exec "$@" 3<&{commands} 4>&{answers}', 'bash', program, '--headless=new', '--no-sandbox',
         '--disable-gpu', '--mute-audio', '--autoplay-policy=no-user-gesture-required', '--remote-debugging-pipe',
         f'--user-data-dir={folder}', '--window-size=1100,1500', 'about:blank'],
        pass_fds=(commands, answers), stderr=subprocess.DEVNULL)
    os.close(commands)
    os.close(answers)
    self._number, self._rest = 0, b''

  def send(self, method, session=None, **params):
    self._number += 1
    message = {'id': self._number, 'method': method, 'params': params, **({'sessionId': session} if session else {})}
    os.write(self._commands, json.dumps(message).encode() + b'\0')
    while True:
      while b'\0' not in self._rest:
        data = os.read(self._answers, 1 << 16)
        assert data, 'Chromium has ended'
        self._rest += data
      line, _, self._rest = self._rest.partition(b'\0')
      answer = json.loads(line)
      if answer.get('id') == self._number:
        assert 'error' not in answer, answer
        return answer['result']

  def close(self):
    self._process.kill()
    self._process.wait()
    os.close(self._commands)
    os.close(self._answers)


@pytest.mark.soak
@pytest.mark.chromium
def test_the_players_switch_at_the_same_place(tmp_path):
  browser = Browser(tmp_path / 'profile')
  try:
    target = browser.send('Target.createTarget', url=pathlib.Path(PAGE).resolve().as_uri())['targetId']
    session = browser.send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
    loaded = 'location.protocol == "file:" && document.readyState == "complete"'
    while not browser.send('Runtime.evaluate', session, expression=loaded)['result']['value']:
      time.sleep(.1)
    seen = browser.send('Runtime.evaluate', session, expression=PROGRAM, awaitPromise=True, returnByValue=True)
    picture = browser.send('Page.captureScreenshot', session, format='jpeg', quality=80)['data']
  finally:
    browser.close()
  place = pathlib.Path(os.environ.get('M2L2_PICTURE', tmp_path / 'page.jpg'))
  place.write_bytes(base64.b64decode(picture))
  assert place.stat().st_size > 20_000
  assert 'exceptionDetails' not in seen, seen
  seen = seen['result']['value']
  others = [0] * (len(seen['before']['playing']) - 1)
  before, after, back = seen['before'], seen['after'], seen['back']
  assert before['playing'] == [1, *others] and 1 < before['reference'] < 3
  assert after['playing'] == [0, 1, *others[1:]] and abs(after['estimate'] - before['reference']) < .4
  assert back['playing'] == [1, *others] and abs(back['reference'] - back['last']) < .3
  assert back['reference'] > before['reference']
  assert abs(seen['durations'][0] - seen['durations'][1]) < .01 and seen['durations'][0] > 2
  assert seen['broken'] == 0 and seen['wide'] <= 0 and seen['pairs'] >= 1
