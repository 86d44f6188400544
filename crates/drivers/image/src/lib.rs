//! Images: import, export, recipes.
//!
//! An image's files come from outside and are untrusted. They are kept as uploaded (so that an export has the same
//! fingerprint) and unpacked once by a worker without privileges ([`karst_host::sandbox`]) into a tree or a disk, which
//! volumes are cloned from.
#![allow(clippy::disallowed_methods)] // drivers and their tests are the real world

pub mod backup;
pub mod disk;
pub mod machine;
pub mod metadata;
pub mod oci;
pub mod ova;
pub mod pack;
pub mod qcow2;
pub mod recipe;
mod sources;
pub mod store;
pub mod unpack;
pub mod vmdk;
pub mod worker;

pub use recipe::Progress;
pub use store::{Content, Export, ExportPart, ImageStore, Staged, Upload};
