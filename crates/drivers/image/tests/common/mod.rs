//! What the tests of this crate share.
#![allow(dead_code, missing_docs)]

use karst_host::sandbox::Launcher;
use karst_image::ImageStore;
use std::path::PathBuf;

pub fn launcher() -> Launcher {
    Launcher {
        program: env!("CARGO_BIN_EXE_karst-image-worker").into(),
        args: vec![],
        id_base: 1_900_000_000,
    }
}

/// Says so and answers true when this test cannot run here.
pub fn skip_without_root_and(tools: &[&str]) -> bool {
    if !super::backends::root() {
        return true;
    }
    let missing =
        tools.iter().find(|t| !["/usr/bin", "/usr/sbin"].iter().any(|d| PathBuf::from(d).join(t).exists()));
    if let Some(tool) = missing {
        super::backends::missing(&format!("{tool} is not installed"));
    }
    missing.is_some()
}

fn cache() -> PathBuf {
    let exe = PathBuf::from(env!("CARGO_BIN_EXE_karst-image-worker"));
    exe.parent().and_then(|p| p.parent()).expect("below target").join("test-cache/images")
}

/// Two tests of one run share the store, but not its opening, which clears its work directories.
static OPENED: tokio::sync::OnceCell<ImageStore> = tokio::sync::OnceCell::const_new();

pub async fn cached_store() -> ImageStore {
    OPENED.get_or_init(|| async { ImageStore::open(cache(), launcher()).await.unwrap() }).await.clone()
}

/// Is some VM image in the cache (of today or not)?
pub fn cached_vm() -> bool {
    std::fs::read_dir(cache().join("recipes")).is_ok_and(|d| {
        d.flatten().any(|e| {
            let label = std::fs::read_to_string(e.path().join("recipe")).unwrap_or_default();
            let today = jiff::Zoned::now().date().to_string();
            label.contains("virtual-machine") && label.ends_with(&today)
        })
    })
}
