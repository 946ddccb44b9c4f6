from slmkit.core.settings import install_hook
install_hook()
