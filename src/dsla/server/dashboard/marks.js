// Conversions in charts: what uPlot does not draw by itself.

import { color } from "./theme.js";

// Every rise of a running request as an arrow from its level before to the one after.
export function drawRises(plot, events) {
  const size = 3.5 * devicePixelRatio;
  draw(plot, events, (ctx, x, event) => {
    const [from, to] = [event.from_level, event.to_level].map((level) => plot.valToPos(level, "y", true));
    line(ctx, x, from, to + size);
    ctx.beginPath();
    ctx.moveTo(x, to);
    ctx.lineTo(x - size, to + 1.6 * size);
    ctx.lineTo(x + size, to + 1.6 * size);
    ctx.fill();
  });
}

// The moments of conversions, as lines over the whole height.
export function drawMoments(plot, events) {
  draw(plot, events, (ctx, x) => {
    ctx.globalAlpha = 0.4;
    line(ctx, x, plot.bbox.top, plot.bbox.top + plot.bbox.height);
  });
}

function draw(plot, events, mark) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = color("flash");
  ctx.lineWidth = 1.5 * devicePixelRatio;
  for (const event of events) {
    if (event.kind !== "level") continue;
    const x = plot.valToPos(event.time, "x", true);
    if (x >= bbox.left && x <= bbox.left + bbox.width) mark(ctx, x, event);
  }
  ctx.restore();
}

function line(ctx, x, from, to) {
  ctx.beginPath();
  ctx.moveTo(x, from);
  ctx.lineTo(x, to);
  ctx.stroke();
}
