// The slider between two methods: the right one is cut off at the slider's place, in all scales at once.
for (const strip of document.querySelectorAll(".strip")) {
  const [left, right] = strip.querySelectorAll("select");
  const slider = strip.querySelector("input");
  if (!left || !right || !slider) continue;
  const show = () => {
    for (const picture of strip.querySelectorAll("[data-states]")) {
      const states = JSON.parse(picture.dataset.states);
      for (const [side, select] of [["left", left], ["right", right]]) {
        const style = states[select.value];
        picture.querySelector("." + side).className = side + " " + (style || "absent");
      }
    }
    strip.style.setProperty("--cut", slider.value + "%");
  };
  for (const part of [left, right, slider]) part.addEventListener("input", show);
  show();
}
