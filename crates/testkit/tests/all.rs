//! All integration tests of this crate in one program: linking one for each file takes longer than running them, and each
//! would hold the whole daemon again. A file that is not named here does not run; `cargo xtask tidy` refuses it.
mod access;
mod addresses;
mod autostart;
mod bad_input;
mod checkpoints;
mod commits;
mod disk_copies;
mod disk_full;
mod displays;
mod full_copies;
mod generations;
mod images;
mod limits;
mod memory_files;
mod node_names;
mod profile_changes;
mod races;
mod recover;
mod restored;
mod sagas;
mod secrets;
mod shared_volumes;
mod snapshots;
mod tenants;
mod two_engines;
