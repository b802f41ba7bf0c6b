use proptest::prelude::*;

use super::*;

fn long(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

fn entry(name: &[u8], value: &[u8]) -> Vec<u8> {
    [&[u8::try_from(name.len()).unwrap()][..], name, value].concat()
}

fn text(text: &[u8]) -> Vec<u8> {
    [&b"S"[..], &long(text)].concat()
}

fn array(inner: &[u8]) -> Vec<u8> {
    [&b"A"[..], &long(inner)].concat()
}

/// With a content type, these headers, and a delivery mode.
fn frame(content_type: &[u8], entries: &[Vec<u8>]) -> Vec<u8> {
    let flags = (1_u16 << 15) | HAS_TABLE | (1 << 12);
    let mut payload = vec![0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4];
    payload.extend(flags.to_be_bytes());
    payload.extend(entry(content_type, &[]));
    payload.extend(long(&entries.concat()));
    payload.push(2);
    [&[2, 0, 1][..], &long(&payload), &[0xce]].concat()
}

fn marked(why: &str) -> Vec<u8> {
    entry(MARK.as_bytes(), &text(why.as_bytes()))
}

fn mended(frame: &[u8], bytes_max: usize) -> Result<Option<Vec<u8>>, Malformed> {
    mend(&mut frame.to_vec(), bytes_max)
}

#[test]
fn a_sound_frame_stays_as_it_is() {
    let table = [&b"F"[..], &long(&[entry(b"a", b"V"), entry(b"b", &array(b"t\x01"))].concat())].concat();
    let values = [
        b"b\x01".to_vec(),
        b"B\x01".to_vec(),
        b"s\x01\x02".to_vec(),
        b"u\x01\x02".to_vec(),
        b"I1234".to_vec(),
        b"i1234".to_vec(),
        b"l12345678".to_vec(),
        b"f1234".to_vec(),
        b"d12345678".to_vec(),
        b"D12345".to_vec(),
        b"T12345678".to_vec(),
        text(b"\xff\xfe"),
        [&b"x"[..], &long(b"\x00")].concat(),
        array(&[]),
        table,
    ];
    let entries: Vec<_> = values.iter().map(|value| entry("größe".as_bytes(), value)).collect();
    assert_eq!(mended(&frame(b"text/plain", &entries), usize::MAX), Ok(None));
    let bare = [&[2, 0, 1, 0, 0, 0, 14, 0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0xce][..]].concat();
    assert_eq!(mended(&bare, usize::MAX), Ok(None), "without any property");
}

#[test]
fn what_is_nested_too_deeply_becomes_the_bytes_that_it_was() {
    let nested = |levels: usize| (0..levels).fold(b"V".to_vec(), |inner, _| array(&inner));
    let sound = frame(b"t", &[entry(b"deep", &nested(LEVELS_MAX))]);
    assert_eq!(mended(&sound, usize::MAX), Ok(None));
    let deep = frame(b"t", &[entry(b"deep", &nested(LEVELS_MAX + 5)), entry(b"next", b"V")]);
    let cut = [&b"x"[..], &long(&nested(4))].concat();
    let cut = (0..LEVELS_MAX).fold(cut, |inner, _| array(&inner));
    let expected = frame(b"t", &[entry(b"deep", &cut), entry(b"next", b"V"), marked("nested")]);
    assert_eq!(mended(&deep, usize::MAX), Ok(Some(expected)));
}

#[test]
fn what_is_no_utf_8_is_marked_and_told_apart_from_what_is() {
    let frame_of = |ty: &[u8], name: &[u8], more: &[Vec<u8>]| frame(ty, &[&[entry(name, b"V")], more].concat());
    let wrong = frame_of("ä\u{20ac}".as_bytes(), b"\xe9t\xe9\xc3", &[]);
    let expected = frame_of("ä\u{20ac}".as_bytes(), b"?t??", &[marked("text")]);
    assert_eq!(mended(&wrong, usize::MAX), Ok(Some(expected)));
    let wrong = frame_of(b"\xff", b"n", &[]);
    assert_eq!(mended(&wrong, usize::MAX), Ok(Some(frame_of(b"?", b"n", &[marked("text")]))));
}

#[test]
fn a_frame_that_is_too_large_leaves_out_its_largest_headers() {
    let entries = [entry(b"large", &text(&[b'l'; 300])), entry(b"small", b"V")];
    let large = frame(b"t", &entries);
    assert_eq!(mended(&large, large.len()), Ok(None));
    let kept = frame(b"t", &[entries[1].clone(), marked("large")]);
    assert_eq!(mended(&large, large.len() - 1), Ok(Some(kept)));
}

/// It arrived as a sound message before, and may have been handled.
#[test]
fn a_frame_that_only_the_server_made_too_large_is_sound_without_what_the_server_wrote() {
    let [large, count] = [entry(b"large", &text(&[b'l'; 300])), entry(b"x-delivery-count", b"b\x01")];
    let death = entry(b"x-first-death-queue", &text(b"orders"));
    let all = frame(b"t", &[large.clone(), death.clone(), count.clone()]);
    let without_death = frame(b"t", &[large.clone(), count]);
    let sent = frame(b"t", &[large]);
    assert_eq!(mended(&all, all.len() - 1), Ok(Some(without_death.clone())), "the count is kept while it fits");
    assert_eq!(mended(&all, without_death.len() - 1), Ok(Some(sent.clone())));
    assert!(mended(&all, sent.len() - 1).unwrap().unwrap().windows(MARK.len()).any(|part| part == MARK.as_bytes()));
}

#[test]
fn a_message_without_headers_is_marked_too() {
    let flags = (1_u16 << 15).to_be_bytes();
    let payload = [&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4][..], &flags, &[1, 0xff]].concat();
    let bare = [&[2, 0, 1][..], &long(&payload), &[0xce]].concat();
    let flags = ((1_u16 << 15) | HAS_TABLE).to_be_bytes();
    let payload = [&payload[..12], &flags, &[1, b'?'], &long(&marked("text"))].concat();
    assert_eq!(mended(&bare, usize::MAX), Ok(Some([&[2, 0, 1][..], &long(&payload), &[0xce]].concat())));
}

/// RabbitMQ and lapin look at neither of the two lowest flags: a message is not held up over them.
#[test]
fn flags_that_mean_nothing_are_no_fault() {
    let mut sent = frame(b"t", &[entry(b"a", b"V")]);
    sent[HEAD_BYTES + FIXED_BYTES - 1] |= 0b11;
    assert_eq!(mended(&sent, usize::MAX), Ok(None));
}

#[test]
fn lengths_that_lie_are_told() {
    let sound = frame(b"t", &[entry(b"a", &array(b"V"))]);
    for (at, byte) in [(sound.len() - 5, 9), (sound.len() - 3, b'?'), (20, 0xff)] {
        let mut lying = sound.clone();
        lying[at] = byte;
        assert_eq!(mended(&lying, usize::MAX), Err(Malformed), "byte {at}");
    }
}

proptest! {
    #[test]
    fn no_bytes_end_the_process(bytes in proptest::collection::vec(any::<u8>(), 0..200), most in 0_usize..300) {
        let _ = mended(&bytes, most);
        let entries = [bytes[..bytes.len().min(150)].to_vec()];
        let _ = mended(&frame(b"t", &entries), most);
    }

    /// A mended frame is a sound one.
    #[test]
    fn a_mended_frame_needs_no_mending(names in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 0..6)) {
        let entries: Vec<_> = names.iter().map(|name| entry(name, &text(name))).collect();
        if let Ok(Some(mended_once)) = mended(&frame(b"t", &entries), usize::MAX) {
            prop_assert_eq!(mended(&mended_once, usize::MAX), Ok(None));
        }
    }
}
