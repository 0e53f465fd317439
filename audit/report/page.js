"use strict";
(() => {
  const players = new Map();

  // The player of a session, made when it is first looked at. It has no poster: with
  // one, player 3.18 forgets what came before the place that it is sent to.
  function player(box) {
    const n = box.id.replace("session-", "");
    if (players.has(n)) return players.get(n);
    const data = document.getElementById("cast-" + n);
    if (!data) return null;
    const p = AsciinemaPlayer.create({ data: JSON.parse(data.textContent) }, box.querySelector(".player"),
      { fit: "width", terminalFontSize: "small", preload: true, controls: true });
    players.set(n, p);
    return p;
  }

  for (const box of document.querySelectorAll(".session")) {
    box.addEventListener("toggle", () => { if (box.open) player(box); });
    let playing = false;
    const button = (name, act) => {
      const b = box.querySelector("[data-" + name + "]");
      if (b) b.addEventListener("click", () => act(player(box)));
    };
    button("toggle", p => { playing ? p.pause() : p.play(); });
    button("back", p => p.seek(Math.max(0, p.getCurrentTime() - 5)));
    button("on", p => p.seek(p.getCurrentTime() + 5));
    box.addEventListener("toggle", () => {
      const p = players.get(box.id.replace("session-", ""));
      if (!p || p.watched) return;
      p.watched = true;
      p.addEventListener("play", () => { playing = true; });
      p.addEventListener("pause", () => { playing = false; });
      p.addEventListener("ended", () => { playing = false; });
    });
  }

  document.addEventListener("click", e => {
    const b = e.target.closest("button[data-session]");
    if (!b) return;
    const box = document.getElementById("session-" + b.dataset.session);
    box.open = true;
    const p = player(box);
    box.scrollIntoView({ block: "start" });
    box.querySelector("summary").focus({ preventScroll: true });
    if (p) p.seek(Number(b.dataset.at)).then(() => p.play());
  });

  // What is linked to is shown, although it is folded in.
  const unfold = () => {
    let id = "";
    try { id = decodeURIComponent(location.hash.slice(1)); } catch { return; }
    const el = id && document.getElementById(id);
    if (el && el.tagName === "DETAILS") el.open = true;
  };
  addEventListener("hashchange", unfold);
  unfold();
})();
