//! All integration tests of this crate in one program: linking one for each file takes longer than running them, and each
//! would hold the whole daemon again. A file that is not named here does not run; `cargo xtask tidy` refuses it.
mod access;
mod api;
#[path = "../../../testkit/src/backends.rs"]
mod backends;
mod backups;
mod bodies;
mod clients;
mod common;
mod described;
mod every_endpoint;
mod history;
mod images;
mod layers;
mod metadata;
mod networks;
mod oci;
mod pending;
mod pools;
mod reasons;
mod recover;
mod remote;
mod secrets;
mod sessions;
mod settings;
mod spice;
mod table;
mod vmids;
mod volumes;
mod walls;
