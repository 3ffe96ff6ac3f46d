"""Report pages: figures as SVG that follow the page's light or dark colours, and the page around them."""
