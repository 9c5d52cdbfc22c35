// Players, waveforms and spectrograms. Clips load one after another, those of the newest view first.

const SPECTRUM_HZ = 24000; // the codec's rate; spectrograms end at half of it
const WINDOW = 512;
const DECODER = new OfflineAudioContext(1, 1, SPECTRUM_HZ);

let waiting = [];
let loading = 0;

/** Load a clip when its turn comes; a signal that is aborted takes it out of the queue. */
function queueClip(source, id, signal) {
  return new Promise((done, failed) => {
    waiting.push({ run: () => source.clip(id, signal).then(done, failed), signal });
    nextClip();
  });
}

function nextClip() {
  waiting = waiting.filter((entry) => !entry.signal.aborted);
  while (loading < 2 && waiting.length) {
    loading += 1;
    waiting.shift().run().finally(() => {
      loading -= 1;
      nextClip();
    });
  }
}

/** A player that fills itself; `ready` gives the clip's bytes. */
function player(source, id, label, signal) {
  const audio = el("audio", { controls: true, preload: "metadata", controlslist: "nodownload noplaybackrate", "aria-label": label });
  const note = el("span", { class: "muted", role: "status", text: "loading …" });
  const box = el("div", { class: "player" }, audio, note);
  const ready = queueClip(source, id, signal).then((bytes) => {
    const url = URL.createObjectURL(new Blob([bytes], { type: "audio/ogg" }));
    signal.addEventListener("abort", () => URL.revokeObjectURL(url), { once: true });
    audio.src = url;
    note.remove();
    return bytes;
  });
  ready.catch((error) => { if (!signal.aborted) note.textContent = `no audio: ${error.message}`; });
  audio.addEventListener("play", () => {
    for (const other of document.querySelectorAll("audio")) if (other !== audio) other.pause();
  });
  return { box, audio, ready };
}

/** Mono samples at SPECTRUM_HZ. */
async function samplesOf(bytes) {
  const decoded = await DECODER.decodeAudioData(bytes.slice(0));
  return decoded.getChannelData(0);
}

/** In-place radix-2 FFT of WINDOW complex numbers (Cooley and Tukey, 1965). */
function fft(re, im) {
  const size = re.length;
  for (let i = 1, j = 0; i < size; i++) {
    let bit = size >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [re[i], re[j]] = [re[j], re[i]];
      [im[i], im[j]] = [im[j], im[i]];
    }
  }
  for (let half = 1; half < size; half <<= 1) {
    for (let k = 0; k < half; k++) {
      const c = Math.cos((-Math.PI * k) / half), s = Math.sin((-Math.PI * k) / half);
      for (let i = k; i < size; i += 2 * half) {
        const r = re[i + half] * c - im[i + half] * s, m = re[i + half] * s + im[i + half] * c;
        re[i + half] = re[i] - r;
        im[i + half] = im[i] - m;
        re[i] += r;
        im[i] += m;
      }
    }
  }
}

/** Log power in dB: `columns` spectra of WINDOW / 2 bins, spread over the samples. */
function spectra(samples, columns) {
  const hann = Float32Array.from({ length: WINDOW }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / WINDOW));
  const power = new Float32Array(columns * (WINDOW / 2));
  const re = new Float32Array(WINDOW), im = new Float32Array(WINDOW);
  for (let column = 0; column < columns; column++) {
    const start = Math.round(((column + 0.5) / columns) * samples.length - WINDOW / 2);
    for (let i = 0; i < WINDOW; i++) {
      re[i] = (samples[start + i] ?? 0) * hann[i];
      im[i] = 0;
    }
    fft(re, im);
    for (let bin = 0; bin < WINDOW / 2; bin++) {
      power[column * (WINDOW / 2) + bin] = 10 * Math.log10(re[bin] ** 2 + im[bin] ** 2 + 1e-10);
    }
  }
  return power;
}

/** A canvas as wide as its box and `height` CSS pixels high; drawn anew when the theme or the width changes. */
function picture(height, label, draw) {
  const canvas = el("canvas", { role: "img", "aria-label": label, style: `height: ${height}px` });
  let width = 0;
  const redraw = () => {
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
    canvas.height = Math.round(height * devicePixelRatio);
    draw(canvas, canvas.getContext("2d"));
  };
  new ResizeObserver(() => {
    if (canvas.clientWidth && canvas.clientWidth !== width) {
      width = canvas.clientWidth;
      redraw();
    }
  }).observe(canvas);
  onTheme(canvas, () => { if (width) redraw(); });
  return canvas;
}

function waveform(samples) {
  return picture(56, "Waveform", (canvas, pen) => {
    const middle = canvas.height / 2;
    pen.fillStyle = color("wave");
    for (let x = 0; x < canvas.width; x++) {
      const from = Math.floor((x / canvas.width) * samples.length);
      const to = Math.max(from + 1, Math.floor(((x + 1) / canvas.width) * samples.length));
      let low = 0, high = 0;
      for (let i = from; i < to && i < samples.length; i++) {
        if (samples[i] < low) low = samples[i];
        if (samples[i] > high) high = samples[i];
      }
      pen.fillRect(x, middle - high * middle, 1, Math.max(1, (high - low) * middle));
    }
  });
}

function spectrogram(samples) {
  return picture(112, `Spectrogram, 0 to ${SPECTRUM_HZ / 2000} kHz`, (canvas, pen) => {
    const columns = Math.min(canvas.width, Math.ceil(samples.length / 32)), bins = WINDOW / 2;
    const power = spectra(samples, columns);
    const top = power.reduce((most, value) => Math.max(most, value), -100);
    const image = new ImageData(columns, bins);
    const back = color("panel").match(/[\d.]+/g).map(Number), ink = color("spectrum").match(/[\d.]+/g).map(Number);
    for (let x = 0; x < columns; x++) {
      for (let bin = 0; bin < bins; bin++) {
        const share = Math.max(0, 1 + (power[x * bins + bin] - top) / 80) ** 1.5; // 80 dB from white to full colour
        const at = 4 * ((bins - 1 - bin) * columns + x);
        for (let c = 0; c < 3; c++) image.data[at + c] = back[c] + (ink[c] - back[c]) * share;
        image.data[at + 3] = 255;
      }
    }
    const small = new OffscreenCanvas(columns, bins);
    small.getContext("2d").putImageData(image, 0, 0);
    pen.drawImage(small, 0, 0, canvas.width, canvas.height);
  });
}

/** Move a line over the pictures of a clip while it plays; a click on them moves the clip. */
function follow(audio, stack) {
  const line = el("div", { class: "playhead", hidden: true });
  stack.append(line);
  const place = () => {
    line.hidden = !audio.currentTime;
    line.style.insetInlineStart = `${(100 * audio.currentTime) / (audio.duration || 1)}%`;
    if (!audio.paused) requestAnimationFrame(place);
  };
  for (const event of ["play", "seeked", "timeupdate"]) audio.addEventListener(event, place);
  stack.addEventListener("click", (event) => {
    if (!audio.duration) return;
    const box = stack.getBoundingClientRect();
    audio.currentTime = ((event.clientX - box.left) / box.width) * audio.duration;
  });
}
