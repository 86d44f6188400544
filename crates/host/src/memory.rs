//! Memory of this process itself.

use std::ffi::c_int;

/// Gives back what of this program's code and constants is mapped, and what of its heap is free, for a daemon whose start is
/// over: most of its pages were read by the start alone. They stay in the page cache, shared by all processes of the program;
/// what is needed again is mapped again by a fault that reads nothing. What the program has written itself is not touched.
pub fn give_back() {
    extern "C" fn segments(object: *mut libc::dl_phdr_info, _size: usize, _: *mut libc::c_void) -> c_int {
        // SAFETY: dl_iterate_phdr(3) hands a valid object, and its table of headers lives as long as the object.
        let (base, headers) = unsafe {
            let object = &*object;
            let headers = match object.dlpi_phdr.is_null() {
                true => &[],
                false => std::slice::from_raw_parts(object.dlpi_phdr, usize::from(object.dlpi_phnum)),
            };
            (object.dlpi_addr, headers)
        };
        for header in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0) {
            let (start, end) = whole_pages(base + header.p_vaddr, header.p_memsz);
            // SAFETY: whole pages of a segment that is mapped from the program's file and not writable: each is read from
            // there again with the content that it has. Relocated constants are in a segment that is writable by its header.
            unsafe { libc::madvise(start as *mut libc::c_void, (end - start) as usize, libc::MADV_DONTNEED) };
        }
        // The first object is the program; its libraries are few pages, and of others.
        1
    }
    // SAFETY: the callback keeps to what it is handed; the allocator trims itself under its own lock.
    unsafe {
        libc::dl_iterate_phdr(Some(segments), std::ptr::null_mut());
        libc::malloc_trim(0);
    }
}

/// First byte of the first page, and first byte after the last, that lie within `size` bytes from `start`, which has no other
/// segment on its own first and last page.
fn whole_pages(start: u64, size: u64) -> (u64, u64) {
    let page = rustix::param::page_size() as u64;
    let first = start.next_multiple_of(page);
    (first, ((start + size) / page * page).max(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of constants, so many that what other tests read of the pages beside them is nothing to it.
    static CONSTANTS: [u8; 4 << 20] = [7; 4 << 20];

    fn read() -> u64 {
        CONSTANTS.iter().step_by(4096).map(|b| u64::from(std::hint::black_box(*b))).sum()
    }

    /// How many pages of the constants are mapped. Not what the whole process has: other tests read code meanwhile.
    fn mapped() -> usize {
        use std::os::unix::fs::FileExt;
        let page = rustix::param::page_size();
        let first = CONSTANTS.as_ptr() as usize / page;
        // An entry of eight bytes for each page of the process; its highest bit says that the page is there.
        let mut entries = vec![0u8; CONSTANTS.len() / page * 8];
        let map = std::fs::File::open("/proc/self/pagemap").unwrap();
        map.read_exact_at(&mut entries, first as u64 * 8).unwrap();
        entries.chunks_exact(8).filter(|entry| entry[7] & 0x80 != 0).count()
    }

    #[test]
    fn what_is_given_back_is_there_when_it_is_needed() {
        let sum = read();
        let before = mapped();
        give_back();
        let after = mapped();
        assert!(before > 512 && after < 512, "{before} pages, then {after}");
        assert_eq!(read(), sum);
        assert_eq!(sum, 7 << 10);
    }

    #[test]
    fn only_whole_pages_are_given_back() {
        assert_eq!(whole_pages(0x1000, 0x2000), (0x1000, 0x3000));
        assert_eq!(whole_pages(0x1001, 0x2000), (0x2000, 0x3000));
        assert_eq!(whole_pages(0x1001, 0x10), (0x2000, 0x2000));
    }
}
