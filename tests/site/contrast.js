/* Contrast of every visible text with the nearest opaque background behind it, by WCAG's formula. */
document.querySelectorAll("details").forEach((fold) => (fold.open = true));
const numbers = (colour) => (colour.match(/[\d.]+/g) || []).map(Number);
const channel = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
function ground(element) {
  for (let at = element; at; at = at.parentElement) {
    const colour = numbers(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
}
const found = new Map();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  if (style.visibility === "hidden" || element.closest("script, style, template, .katex-mathml, option")) continue;
  const ink = numbers(element.closest("svg") ? style.fill : style.color);
  const [a, b] = [luminance(ink), luminance(ground(element))].sort((x, y) => y - x);
  const contrast = Math.round(((a + 0.05) / (b + 0.05)) * 100) / 100;
  found.set(`${ink} on ${ground(element)}`, { text: walker.currentNode.data.trim().slice(0, 40), contrast });
}
return [...found.values()];
