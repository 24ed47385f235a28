// What the built page needs in the browser and cannot be given by the server: names for the widgets'
// controls (the widget manager makes them there), for readers who hear the page instead of seeing it.

// Otherwise the theme replaces the icon elements that ipywidgets' Play buttons still write to.
window.FontAwesomeConfig = { autoReplaceSvg: "nest" };

(function () {
  function name(element, label) {
    if (label && !element.hasAttribute("aria-label")) element.setAttribute("aria-label", label);
  }

  function nameControls() {
    document.querySelectorAll(".widget-slider, .widget-inline-hbox").forEach(function (box) {
      const label = box.querySelector(".widget-label");
      const readout = box.querySelector(".widget-readout");
      const text = label ? label.textContent.trim() : "";
      box.querySelectorAll("[role=slider]").forEach(function (handle) {
        name(handle, text);
        // A slider over words is read by its word, not by its position.
        if (readout && handle.getAttribute("aria-valuetext") !== readout.textContent)
          handle.setAttribute("aria-valuetext", readout.textContent);
      });
      if (readout && readout.isContentEditable) {
        readout.setAttribute("role", "textbox");
        name(readout, text + ", value");
      }
    });
    document.querySelectorAll(".widget-play button").forEach(function (button) {
      const icon = button.querySelector("[class*=fa-], [data-icon]");
      const kind = icon && /fa-(play|pause|stop|repeat)|data-icon="(\w+)"/.exec(icon.outerHTML);
      name(button, button.title || (kind && (kind[1] || kind[2])) || "play");
    });
  }

  window.addEventListener("load", function () {
    // The widget manager typesets descriptions as MathJax 2 does; the page has MathJax 3.
    if (window.MathJax && !window.MathJax.Hub)
      window.MathJax.Hub = { Queue: (call) => window.MathJax.typesetPromise([call[2]]) };
    nameControls();
    if (document.querySelector("script[type^='application/vnd.jupyter.widget']"))
      new MutationObserver(nameControls).observe(document.body, { childList: true, subtree: true, characterData: true });
  });
})();
