"use strict";
(() => {
  // One clock drives all videos. They play by themselves (smooth at any size); small drift is taken back through
  // playbackRate, large drift by a seek. When paused, every video is put on the middle of the same frame.
  // Of images there is no clock and no player; swapping and the difference are the same.
  const body = document.body;
  const find = (name) => document.getElementById(name);
  const videos = [...document.querySelectorAll("video")];
  const images = [...document.querySelectorAll(".stage img")];
  const stages = [...document.querySelectorAll(".stage")];
  const fps = Number(body.dataset.fps);
  const frames = Number(body.dataset.frames);
  const end = frames / fps;
  const play = find("play"), scrub = find("scrub"), where = find("where"), speed = find("speed");
  const state = { time: 0, playing: false, rate: 1, last: 0, difference: false };
  const visible = new Set();
  const advanced = new Set();
  let errors = 0;

  const fail = () => { errors += 1; body.dataset.errors = String(errors); };
  addEventListener("error", fail);
  addEventListener("unhandledrejection", fail);
  body.dataset.errors = "0";
  body.dataset.videos = String(videos.length);
  body.dataset.images = String(images.length);

  const frameAt = (time) => Math.min(frames - 1, Math.max(0, Math.floor(time * fps + 1e-6)));

  function show(frame) {
    if (!scrub) return;
    scrub.value = String(frame);
    where.textContent = `${frame + 1} / ${frames}`;
  }

  function settle(video) {  // a paused video on the middle of the clock's frame
    const target = (frameAt(state.time) + 0.5) / fps;
    if (video.readyState > 0 && Math.abs(video.currentTime - target) > 0.0005) video.currentTime = target;
  }

  function setPlaying(on) {
    state.playing = on;
    body.dataset.status = on ? "playing" : "paused";
    play?.setAttribute("aria-label", on ? "Pause" : "Play");
    if (on) return;
    for (const video of videos) { video.pause(); settle(video); }
  }

  function seek(frame) {
    setPlaying(false);
    state.time = (frame + 0.5) / fps;
    for (const video of visible) settle(video);
    show(frame);
  }

  function start(video) {
    // play() is refused when a pause follows at once, or where autoplay is forbidden; neither is an error here.
    video.play().catch((reason) => { if (reason.name === "NotAllowedError") setPlaying(false); });
  }

  function follow(video) {
    if (video.readyState < 2 || video.seeking) return;
    const drift = video.currentTime - state.time;
    if (Math.abs(drift) > 1.5 / fps) video.currentTime = Math.min(state.time, end - 0.01);
    video.playbackRate = state.rate * (1 - Math.max(-0.2, Math.min(0.2, drift * 2)));
    if (video.paused && !video.ended) start(video);
    if (video.currentTime > 0) advanced.add(video);
  }

  const ready = (medium) => medium.complete || medium.readyState >= 2;

  function drawDifference(stage) {
    // |a − b| by the compositor, then twice added to itself: four times the difference, clipped at white.
    const [a, b] = stage.querySelectorAll("video, img");
    const canvas = stage.querySelector("canvas");
    if (!ready(a) || !ready(b)) return;
    const width = a.videoWidth || a.naturalWidth;
    if (canvas.width !== width) { canvas.width = width; canvas.height = a.videoHeight || a.naturalHeight; }
    const pen = canvas.getContext("2d");
    pen.globalCompositeOperation = "copy";
    pen.drawImage(a, 0, 0);
    pen.globalCompositeOperation = "difference";
    pen.drawImage(b, 0, 0, canvas.width, canvas.height);
    pen.globalCompositeOperation = "lighter";
    pen.drawImage(canvas, 0, 0);
    pen.drawImage(canvas, 0, 0);
  }

  function tick(now) {
    const passed = Math.min(0.1, (now - state.last) / 1000);
    state.last = now;
    if (state.playing) {
      state.time += passed * state.rate;
      if (state.time >= end) {
        state.time = 0;
        for (const video of visible) video.currentTime = 0;
      }
      for (const video of visible) follow(video);
      show(frameAt(state.time));
      body.dataset.advanced = String(advanced.size);
    }
    if (state.difference) {
      for (const stage of stages) if (visible.has(stage.querySelector("video, img"))) drawDifference(stage);
    }
    requestAnimationFrame(tick);
  }

  // Only what is on screen is decoded.
  const watcher = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) {
        visible.add(target);
        if (!state.playing) settle(target);
      } else {
        visible.delete(target);
        target.pause?.();
      }
    }
  }, { rootMargin: "80px" });
  let loaded = 0;
  const count = () => { loaded += 1; body.dataset.loaded = String(loaded); };
  for (const video of videos) {
    if (video.readyState >= 2) count(); else video.addEventListener("loadeddata", count, { once: true });
    video.addEventListener("loadedmetadata", () => { if (!state.playing) settle(video); });
    video.addEventListener("error", fail);
    watcher.observe(video);
  }
  for (const image of images) {
    if (image.complete) count(); else image.addEventListener("load", count, { once: true });
    image.addEventListener("error", fail);
    watcher.observe(image);
  }

  const press = (button, on) => button.setAttribute("aria-pressed", String(on));
  const pressed = (button) => button.getAttribute("aria-pressed") === "true";
  function swap(stage, on) {
    stage.classList.toggle("swapped", on);
    press(stage, on);
  }
  function toggleAll() {
    const on = !pressed(find("swap"));
    press(find("swap"), on);
    for (const stage of stages) swap(stage, on);
  }
  function toggleDifference() {
    state.difference = !state.difference;
    press(find("difference"), state.difference);
    body.classList.toggle("with-difference", state.difference);
  }
  for (const stage of stages) {
    const columns = () => (state.difference ? 3 : 2);
    const over = (event) => {  // the second column, whichever video is in it now
      const box = stage.getBoundingClientRect();
      return Math.floor((columns() * (event.clientX - box.left)) / box.width) === 1;
    };
    stage.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse") swap(stage, over(event) !== pressed(find("swap")));
    });
    stage.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") swap(stage, pressed(find("swap")));
    });
    stage.addEventListener("click", (event) => {
      if (event.pointerType !== "mouse") swap(stage, !pressed(stage));
    });
  }

  play?.addEventListener("click", () => setPlaying(!state.playing));
  find("back")?.addEventListener("click", () => seek((frameAt(state.time) + frames - 1) % frames));
  find("next")?.addEventListener("click", () => seek((frameAt(state.time) + 1) % frames));
  scrub?.addEventListener("input", () => seek(Number(scrub.value)));
  speed?.addEventListener("change", () => { state.rate = Number(speed.value); });
  find("swap").addEventListener("click", toggleAll);
  find("difference").addEventListener("click", toggleDifference);

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inside = event.target.closest("button, select, input, summary, .scroll");
    if (event.key === " " && play && !(inside && inside.matches("button, select, summary"))) setPlaying(!state.playing);
    else if (event.key === "ArrowLeft" && !inside) find("back")?.click();
    else if (event.key === "ArrowRight" && !inside) find("next")?.click();
    else if (event.key === "Enter" && event.target.classList.contains("stage")) swap(event.target, !pressed(event.target));
    else if (event.key === "s") toggleAll();
    else if (event.key === "d") toggleDifference();
    else return;
    event.preventDefault();
  });

  show(0);
  setPlaying(Boolean(play) && !matchMedia("(prefers-reduced-motion: reduce)").matches);
  requestAnimationFrame((now) => { state.last = now; tick(now); });
})();
