// The search runs in a worker, which a browser does not let a page start that is read from the disk.
// There it runs in a hidden frame. The theme would fetch a script for that from elsewhere; its file
// name tells it that there is one.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const { contentDocument: page, contentWindow: worker } = this.frame;
      page.open();
      worker.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = page.createElement("script");
      script.src = url;
      this.loaded = new Promise((resolve) => script.addEventListener("load", resolve));
      page.append(page.createElement("html"));
      page.documentElement.append(script);
      page.close();
    }

    postMessage(data) {
      const send = () => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
      this.loaded.then(send);
    }

    terminate() {
      this.frame.remove();
    }
  };
}
