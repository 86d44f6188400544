//! All integration tests of this crate in one program: linking one for each file takes longer than running them, and each
//! would hold the whole daemon again. A file that is not named here does not run; `cargo xtask tidy` refuses it.
mod causes;
mod checkpoints;
mod compare;
mod copies;
mod corpus;
mod crowd;
mod define;
mod documents;
mod elements;
mod events;
mod fuzzed;
mod graphics;
mod host;
mod memory;
mod monitor;
mod networks;
mod ports;
mod power;
mod protocol;
mod read_only;
mod remote;
mod secrets;
mod sides;
mod support;
mod threads;
mod volumes;
